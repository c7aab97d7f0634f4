"""Training steps whose master weights and optimizer state are files, of which memory holds a few blocks at a time."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from ..errors import InputError
from ..nn import Mistral, Stacked, stack
from ..nn.precision import at_least_float32
from .batch import Batch
from .checkpoints import check_same_run, not_written
from .step import Metrics, TrainState, make_step
from .trained import trained


# The file that says which files are those of the last complete step.
_MARKER = "about.json"


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What one update changes: one block, or all weights outside of blocks.

    **Attributes:**

    - `kind`: the index in the layer pattern; `None` for the weights outside of blocks.
    - `repeat`: the repeat of the layer pattern.
    """

    kind: int | None
    repeat: int = 0

    @property
    def name(self) -> str:
        return "outer" if self.kind is None else f"block-{self.repeat}-{self.kind}"

    @property
    def index(self) -> Array | None:
        """The index of its entries in the arrays of `of`; `None` for all of them."""
        return None if self.kind is None else jnp.asarray(self.repeat, jnp.int32)

    def of(self, tree: Stacked) -> PyTree:
        """The arrays, in a tree with the structure of the weights, that have its entries."""
        return tree.outer if self.kind is None else tree.pattern[self.kind]


class DiskStep:
    """A training step whose master weights and optimizer state are files.

    ```python
    step = mx.train.DiskStep(mx.train.adamw(3e-4), "run/moments")
    state = step.init(model)  # begins, or continues what the folder holds
    state, metrics = step(state, batch)
    ```

    Memory holds the weights and the gradients in one precision, and master weights and optimizer state of at most four
    blocks. One compiled call computes all gradients. Then the weights are updated block by block: meanwhile one thread
    reads the files of the next block, and another one writes those of the last block.

    A step writes new files beside those that it reads. So a process that ends at any time leaves the master weights and
    the optimizer state of the last complete step, from which `init` continues. [`mistral_eqx.Trainer`][] takes such
    steps with `offload="disk"`.

    **Arguments:**

    - `optimizer`: any elementwise optax transformation, as for [`mistral_eqx.train.TrainState`][]'s `init`.
    - `folder`: the folder of the files, for one process. They take twice the bytes of master weights and optimizer
        state, 24 for each trained weight with AdamW.
    - `options`: those of [`mistral_eqx.train.make_step`][].

    **Raises:** `ValueError` if there are several processes.
    """

    def __init__(self, optimizer: optax.GradientTransformation, folder: str | Path, **options: Any):
        if jax.process_count() > 1:
            raise InputError(
                "Master weights and optimizer state in files are for one process, and there are "
                f"{jax.process_count()}; start one, or shard the state over devices with a mesh and zero=3.",
                key="offload",
            )
        self.folder = Path(folder)
        self._optimizer = optimizer
        self._gradient = make_step(keeping_gradients(), **options)
        self._update = eqx.filter_jit(partial(_updated, optimizer), donate="all-except-first")
        self._about: dict[str, Any] | None = None
        # The set of files of the last step, which count after `mark`.
        self._files = 0

    def init(self, model: Mistral | Stacked, *, dtype: DTypeLike = jnp.bfloat16) -> TrainState:
        """The state before the next step: that of the files, or, if there are none, that of a model.

        **Arguments:**

        - `model`: the model, on one device. Its weights in float32 are the first master weights.
        - `dtype`: the precision of weights and gradients in memory. With float32, a step has the results of
            [`mistral_eqx.train.make_step`][].

        **Returns:** the state. Its `optimizer_state` is the clipped gradient of the last step.

        **Raises:** `ValueError` if the model is on a mesh, the files are damaged or those of another model or
        optimizer, or they cannot be written.
        """
        if model.mesh is not None:
            raise InputError(
                "The model is on a mesh, and a DiskStep trains on one device; leave the mesh out, or shard the state "
                "over devices with make_step and zero=3."
            )
        stacked = stack(model) if isinstance(model, Mistral) else model
        state = TrainState.init(stacked, keeping_gradients(), dtype=dtype)
        first = eqx.filter(stacked, trained(stacked))
        shapes = {piece.name: _shapes(self._like(piece.of(first), piece)) for piece in _pieces(first)}
        about = _read_about(self.folder)
        if about is not None and about["shapes"] != shapes:
            raise InputError(
                f"The files in {self.folder} are those of another model or optimizer; take the same ones, or another "
                "folder.",
                file=self.folder,
            )
        if about is None or about["steps"] == 0:
            with self._write_errors():
                self.folder.mkdir(parents=True, exist_ok=True)
                for piece in _pieces(first):
                    _write(self._file(piece, 0), self._first(piece.of(first), piece))
            self._files = 0
            self._mark({"files": 0, "steps": 0, "skipped": 0, "shapes": shapes})
            return state
        self._about, self._files = about, about["files"]
        weights, constants = eqx.partition(state.model, trained(state.model))
        for piece in _pieces(weights):
            master, _ = _read(self._file(piece, self._files), self._like(piece.of(first), piece))
            weights = _put(weights, piece, _stored(piece.of(weights), master, piece.index))
        return eqx.tree_at(
            lambda state: (state.model, state.steps, state.skipped),
            state,
            (eqx.combine(weights, constants), *(jnp.asarray(about[name], jnp.int32) for name in ("steps", "skipped"))),
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Makes one step, and returns when its files are written. The given state cannot be used again.

        **Raises:** `ValueError` as the step of [`mistral_eqx.train.make_step`][], and if `init` did not make the state
        or the files cannot be written, as on a full disk; `init` then continues from the last complete step.
        """
        state, metrics = self.unmarked(state, batch)
        self.mark(state)
        return state, metrics

    def unmarked(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Makes one step, whose files do not count before `mark`; call `mark` before the next step."""
        if self._about is None:
            raise InputError("A DiskStep continues from its files; make the state with its init.")
        state, metrics = self._gradient(state, batch)
        if bool(metrics.finite):
            with self._write_errors():
                state = eqx.tree_at(lambda state: state.model, state, self._updated(state, self._files))
            self._files = 1 - self._files
        return state, metrics

    def mark(self, state: TrainState, **more: Any):
        """Lets the files of the last step count, and keeps further values, as JSON types, in `about`."""
        steps = {"steps": int(state.steps), "skipped": int(state.skipped)}
        self._mark(self.about | {"files": self._files} | steps | more)

    @property
    def about(self) -> dict[str, Any]:
        """What was marked last; `init` reads it."""
        return {} if self._about is None else self._about

    def _updated(self, state: TrainState, files: int) -> Stacked:
        weights, constants = eqx.partition(state.model, trained(state.model))
        gradient, pieces = state.optimizer_state, list(_pieces(weights))

        def read(piece: _Piece) -> PyTree[np.ndarray]:
            return _read(self._file(piece, files), self._like(piece.of(gradient), piece))

        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            reading, writing = reader.submit(read, pieces[0]), None
            for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
                stored = reading.result()
                if following is not None:
                    reading = reader.submit(read, following)
                given = piece.of(gradient), stored, piece.index
                new, stored = self._update(given, piece.of(weights))
                weights = _put(weights, piece, new)
                if writing is not None:
                    writing.result()
                writing = writer.submit(_write, self._file(piece, 1 - files), stored)
            if writing is not None:
                writing.result()
        return eqx.combine(weights, constants)

    def _first(self, weights: PyTree[Array], piece: _Piece) -> PyTree[Array]:
        """The first master weights of a piece, and their optimizer state."""
        master = jax.tree.map(lambda leaf: _entry(leaf, piece.index).astype(at_least_float32(leaf.dtype)), weights)
        return master, self._optimizer.init(master)

    def _like(self, weights: PyTree[Array], piece: _Piece) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.eval_shape(partial(self._first, piece=piece), weights)

    def _file(self, piece: _Piece, files: int) -> Path:
        return self.folder / f"{piece.name}.{files}"

    def _mark(self, about: dict[str, Any]):
        """Says which files are those of the last complete step."""
        new = self.folder / "about.json.new"
        with self._write_errors():
            new.write_text(json.dumps(about))
            os.replace(new, self.folder / _MARKER)
        self._about = about

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Raises `InputError` if files cannot be written; it names the last complete step."""
        try:
            yield
        except OSError as error:
            raise not_written(self.folder, error, self.about.get("steps") or None) from error


class DiskCheckpoints:
    """The files of a DiskStep in the place of [`mistral_eqx.train.Checkpoints`][]: its last step is the checkpoint.

    **Arguments:**

    - `step`: the step, after its `init`.
    - `about`: as for `Checkpoints`.
    """

    def __init__(self, step: DiskStep, about: Mapping[str, Any]):
        self._step = step
        self._run = json.loads(json.dumps(about))

    @property
    def latest(self) -> int | None:
        """The last complete step, or `None` before the first one."""
        return self._step.about["steps"] or None

    def save(self, state: TrainState, more: Mapping[str, Any]) -> int:
        """Marks the last step, and keeps further values with it."""
        self._step.mark(state, run=self._run, more=dict(more))
        return int(state.steps)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state, which `init` has read, and the further values.

        **Raises:** `ValueError` if there is no step, or it belongs to another model.
        """
        if self.latest is None:
            raise InputError(f"There is no checkpoint in {self._step.folder}; train first, or give another folder.")
        about = self._step.about
        check_same_run(self._step.folder, about.get("run", {}), self._run)
        return state, about["more"]

    def close(self):
        """The files are written already."""


def complete_steps(folder: Path) -> int:
    """The number of steps of the run whose files a folder holds; 0 if there is none."""
    about = _read_about(folder)
    return 0 if about is None else about["steps"]


def keeping_gradients() -> optax.GradientTransformation:
    """Changes no weights; its state is the gradient."""

    def init(params: PyTree[Array]) -> PyTree[Array]:
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates: PyTree[Array], state: PyTree[Array], params: PyTree[Array] | None = None) -> Any:
        return init(updates), updates

    return optax.GradientTransformation(init, update)


def _updated(
    optimizer: optax.GradientTransformation,
    given: tuple[PyTree[Array], PyTree[Array | np.ndarray], Array | None],
    weights: PyTree[Array],
) -> tuple[PyTree[Array], PyTree[Array]]:
    """New weights of one piece, and its new master weights and optimizer state."""
    gradient, (master, optimizer_state), index = given
    gradient = jax.tree.map(lambda leaf, like: _entry(leaf, index).astype(like.dtype), gradient, master)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, master)
    master = eqx.apply_updates(master, updates)
    return _stored(weights, master, index), (master, optimizer_state)


def _entry(leaf: Array, index: Array | None) -> Array:
    return leaf if index is None else lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _stored(weights: PyTree[Array], master: PyTree[Array | np.ndarray], index: Array | None) -> PyTree[Array]:
    """The weights with master weights in their precision, at an index of their first axis."""

    def stored(leaf: Array, new: Array | np.ndarray) -> Array:
        new = jnp.asarray(new).astype(leaf.dtype)
        return new if index is None else lax.dynamic_update_index_in_dim(leaf, new, index, 0)

    return jax.tree.map(stored, weights, master)


def _pieces(weights: Stacked) -> Iterator[_Piece]:
    """The pieces that have trained weights."""
    in_blocks = jax.tree.leaves(weights.pattern)
    repeats = range(in_blocks[0].shape[0] if in_blocks else 0)
    kinds = [_Piece(kind, repeat) for repeat in repeats for kind in range(len(weights.pattern))]
    return (piece for piece in (_Piece(None), *kinds) if jax.tree.leaves(piece.of(weights)))


def _put(weights: Stacked, piece: _Piece, new: PyTree[Array]) -> Stacked:
    return eqx.tree_at(piece.of, weights, new)


def _shapes(tree: PyTree[jax.ShapeDtypeStruct]) -> list[list[Any]]:
    """The shape and the type of each array, as JSON types."""
    return [[list(leaf.shape), str(leaf.dtype)] for leaf in jax.tree.leaves(tree)]


def _read(file: Path, like: PyTree[jax.ShapeDtypeStruct]) -> PyTree[np.ndarray]:
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    found = file.stat().st_size if file.exists() else 0
    if found != size:
        raise _damaged(file, f"has {found} bytes in place of {size}")
    with file.open("rb") as opened:
        return jax.tree.map(lambda leaf: np.fromfile(opened, leaf.dtype, leaf.size).reshape(leaf.shape), like)


def _read_about(folder: Path) -> dict[str, Any] | None:
    file = folder / _MARKER
    try:
        # The state of callbacks may have infinities.
        return json.loads(file.read_bytes()) if file.exists() else None
    except ValueError:
        raise _damaged(file, "is not JSON") from None


def _damaged(file: Path, how: str) -> InputError:
    return InputError(
        f"{file} {how}, so it is damaged; put a copy of the folder in its place, or train in another folder.", file=file
    )


def _write(file: Path, tree: PyTree[Array]):
    with file.open("wb") as opened:
        for leaf in jax.tree.leaves(tree):
            # `tofile` does not say why the system refused.
            opened.write(np.asarray(leaf).reshape(-1).view(np.uint8).data)
