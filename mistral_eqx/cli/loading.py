"""Finds and loads a model by its name, with progress bars."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from . import processes
from .programs import keep_programs


if TYPE_CHECKING:
    from jax.sharding import Mesh

    from ..generation.proposals import Speculate
    from ..nn import Mistral, Stacked
    from ..parallel import Strategy
    from .options import ModelOptions, SpeculationOptions


def locate(name: str) -> Path:
    """The file or folder of a model, fetched under a progress bar if it is not here yet."""
    from ..checkpoint import hub
    from .progress import progress_bar

    fetched = 0
    with progress_bar(f"Fetching {name}") as bar:

        def report(done: int, total: int):
            nonlocal fetched
            fetched = total
            bar(done, total)

        path = hub.locate(name, progress=report)
    if fetched:
        processes.say(f"Fetched {name} ({fetched / 1e6:.0f} MB) to {path.parent}.")
    return path


def load(path: Path, wanted: ModelOptions, mesh: Mesh | None, strategy: Strategy) -> Mistral:
    """Loads the model and its adapters under a progress bar, onto a mesh if there is one.

    Compiled programs are kept for the next run.
    """
    import mistral_eqx as mx

    from .progress import progress_bar

    if strategy.axes("layers"):
        raise InputError(
            f"The strategy {strategy.layout!r} splits 'layers' into stages, which only 'mistral-eqx train' does; leave "
            "'layers' out of --strategy.",
            key="strategy",
        )
    _keep_compiled_programs()
    with progress_bar("Loading") as bar:
        options = {"dtype": wanted.dtype, "check": wanted.check, "mesh": mesh, "strategy": strategy}
        model = mx.load(path, progress=bar, **options)
    if wanted.adapter is not None:
        model = mx.load_lora(model, wanted.adapter)
    _multiply_as_stored(model)
    return model


def load_stacked(path: Path, wanted: ModelOptions, mesh: Mesh, strategy: Strategy) -> Stacked:
    """Loads the model as `load` does, without adapters, for a strategy that splits `layers`."""
    import mistral_eqx as mx

    from .progress import progress_bar

    _keep_compiled_programs()
    with progress_bar("Loading") as bar:
        options = {"dtype": wanted.dtype, "check": wanted.check, "mesh": mesh, "strategy": strategy}
        model = mx.load_stacked(path, progress=bar, **options)
    _multiply_as_stored(model.outer)
    return model


class Speculating:
    """What proposes tokens, from the options: checked at once, and loaded when it is called.

    **Arguments:**

    - `wanted`: the options.
    - `vocab`: the vocabulary of the model.

    **Raises:** `ValueError` if the options do not go together, or the draft has another vocabulary.
    """

    def __init__(self, wanted: SpeculationOptions, vocab: int):
        from ..checkpoint import open_checkpoint
        from ..generation.proposals import check_vocabulary

        wanted.check()
        self._wanted = wanted
        self._path = None if wanted.draft is None else locate(wanted.draft)
        if self._path is not None:
            self._config = open_checkpoint(self._path).config
            check_vocabulary(self._config.vocab, vocab)

    def check(self, mesh: Mesh | None, strategy: Strategy):
        """Checks that the draft can be split, before anything is loaded.

        **Raises:** `ValueError` if it cannot.
        """
        if self._path is not None and mesh is not None:
            strategy.check(self._config, mesh)

    def __call__(self, model: ModelOptions, mesh: Mesh | None, strategy: Strategy) -> Speculate | None:
        """Loads a draft as the model is loaded: in the same precision, and split in the same way."""
        import mistral_eqx as mx

        if self._path is None:
            return mx.PromptLookup() if self._wanted.prompt_lookup else None
        return mx.Draft(load(self._path, dataclasses.replace(model, adapter=None), mesh, strategy))


def precision(model: Mistral) -> str:
    """How the model's matrices are stored and multiplied, in words."""
    import jax

    from ..quant import formats

    found = formats(model)
    if found:
        return f"{' and '.join(found)} blocks, activations {model.dtype.name}"
    chosen = jax.config.values["jax_default_matmul_precision"]
    return model.dtype.name if chosen is None else f"{model.dtype.name}, matmul precision {chosen}"


def _multiply_as_stored(model: Mistral):
    """Makes float32 products exact: TPUs and recent GPUs use fewer bits by default."""
    import jax

    if model.dtype == "float32" and jax.config.values["jax_default_matmul_precision"] is None:
        jax.config.update("jax_default_matmul_precision", "highest")


def _keep_compiled_programs():
    import jax

    from ..checkpoint import hub

    # A folder that the user has set stays.
    if jax.config.values["jax_compilation_cache_dir"] is None:
        keep_programs(hub.cache_folder() / "xla")
