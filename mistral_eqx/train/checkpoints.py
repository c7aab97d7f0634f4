"""Checkpoints of a training run, which can continue on another mesh or with another strategy."""

import importlib.util
import json
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from ..errors import InputError
from .step import TrainState


class Checkpoints:
    """The checkpoints of a run, written by Orbax: each in its own subfolder, named by its step.

    Threads write a checkpoint while the training continues, under a temporary name until it is complete. So the last
    complete checkpoint can be read whenever the process or the machine ends. Checkpoints do not depend on shardings:
    a run can restore them on any mesh. It needs the extra `train`.

    **Arguments:**

    - `folder`: the folder of the checkpoints.
    - `about`: values by name, as JSON types, that must be the same in a run that continues from these checkpoints.
    - `keep`: the number of checkpoints to keep, the newest ones.

    **Raises:** `ValueError` if Orbax is not installed, or `keep` is less than 1.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], *, keep: int = 2):
        if keep < 1:
            raise InputError(f"A run cannot keep {keep} checkpoints; keep at least 1.")
        if importlib.util.find_spec("orbax") is None:
            raise InputError("Checkpoints of a run need the extra `train`: pip install 'mistral-eqx[train]'.")
        # The import takes seconds, so only runs that keep checkpoints pay for it.
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        # As JSON returns them: tuples become lists.
        self._about = json.loads(json.dumps(about))
        self._args = ocp.args
        # The next run removes checkpoints that were not completed.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(),
            "more": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or `None`."""
        return self._manager.latest_step()

    def save(self, state: TrainState, more: Mapping[str, Any]) -> int:
        """Starts to write a checkpoint, and returns as soon as the state may change again.

        **Arguments:**

        - `state`: the state that a step returned.
        - `more`: further values to keep, as JSON types.

        **Returns:** the step.

        **Raises:** `ValueError` if this checkpoint or the one before cannot be written; complete ones are not affected.
        """
        step = int(state.steps)
        items = self._args.Composite(
            state=self._args.StandardSave(_by_name(state)),
            about=self._args.JsonSave(self._about),
            more=self._args.JsonSave(dict(more)),
        )
        with _WriteErrors(self):
            # A run may stop at a step whose checkpoint is already saved.
            if step not in self._manager.all_steps():
                self._manager.save(step, args=items, force=True)
        return step

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest checkpoint that is not damaged, with a warning for each damaged one.

        **Arguments:**

        - `state`: a new state, with any sharding; its arrays are deleted.

        **Returns:** the state of the checkpoint, sharded like `state`, and the `more` that was saved with it.

        **Raises:** `ValueError` if the checkpoint belongs to another model or optimizer.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise InputError(f"There is no checkpoint in {self.folder}; train first, or give another folder.")
        for step in steps:
            try:
                found = self._restore(step, state)
            except (InputError, MemoryError, jax.errors.JaxRuntimeError):  # not caused by the files
                raise
            except Exception as error:  # for damaged files Orbax raises errors of any type
                damaged = f"The checkpoint of step {step} in {self.folder} is damaged ({type(error).__name__})"
                if step == steps[-1]:
                    raise InputError(
                        f"{damaged}, and there is no earlier one that can be read; delete the folder to start again.",
                        file=self.folder,
                    ) from error
                warnings.warn(f"{damaged} and renamed; the one before it is used.", stacklevel=2)
                self._rename_damaged(step)
            else:
                return found
        raise AssertionError("the loop returns, or raises at the last step")

    def _rename_damaged(self, step: int):
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(self.folder / f"damaged-{step}-{uuid.uuid4().hex[:8]}")
        self._manager.reload()

    def _restore(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        found = self._manager.restore(
            step, args=self._args.Composite(about=self._args.JsonRestore(), more=self._args.JsonRestore())
        )
        check_same_run(self.folder, found["about"], self._about)
        arrays = _by_name(state)
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in arrays.items()
        }
        self._check(step, wanted)
        for leaf in arrays.values():
            if not leaf.is_deleted():
                leaf.delete()  # memory never holds two states
        read = self._manager.restore(step, args=self._args.Composite(state=self._args.StandardRestore(wanted)))["state"]
        return _named(state, read), found["more"]

    def wait(self):
        """Waits until all checkpoints are complete.

        **Raises:** `ValueError` if one cannot be written.
        """
        with _WriteErrors(self):
            self._manager.wait_until_finished()

    def close(self):
        """Waits until all checkpoints are complete, and ends the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]):
        metadata: Any = self._manager.item_metadata(step)["state"].tree
        saved = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in metadata.items()}
        now = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in wanted.items()}
        for name in {**now, **saved}:
            if saved.get(name) != now.get(name):
                raise InputError(
                    f"The checkpoint in {self.folder} has {_shown(saved.get(name))} for {name!r}, and this run has "
                    f"{_shown(now.get(name))}; use another folder, or the same model and optimizer."
                )


def check_same_run(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]):
    """Refuses a checkpoint that was saved with other values of those that must be the same."""
    for name in {**saved, **now}:
        if saved.get(name) != now.get(name):
            raise InputError(
                f"The checkpoint in {folder} belongs to a run with {name} {saved.get(name)!r}, and this run has "
                f"{now.get(name)!r}; use another folder."
            )


class _WriteErrors:
    """Raises `InputError` if a checkpoint could not be written; it names the newest complete one."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def __enter__(self):
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any):
        # The writing threads raise errors of several types, also those of the file system.
        if isinstance(error, Exception):
            raise not_written(self._checkpoints.folder, error, self._checkpoints.latest) from error


def not_written(folder: Path, error: Exception, latest: int | None) -> InputError:
    """The error for a checkpoint that cannot be written to a folder, whose newest complete one is that of a step."""
    complete = "None is complete yet" if latest is None else f"The one of step {latest} is complete"
    reason = " ".join(str(error).split())
    reason = reason if len(reason) < 120 else f"{reason[:60]} ... {reason[-55:]}"
    return InputError(
        f"A checkpoint could not be written to {folder}: {reason}. {complete}; free space or repair the folder, and "
        "run the training again.",
        file=folder,
    )


def _by_name(state: TrainState) -> dict[str, Array]:
    leaves = jax.tree_util.tree_flatten_with_path(eqx.filter(state, eqx.is_array))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _named(state: TrainState, arrays: Mapping[str, Array]) -> TrainState:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            arrays[jax.tree_util.keystr(path, simple=True, separator=".")] if eqx.is_array(leaf) else leaf
        ),
        state,
    )


def _shown(array: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if array is None else f"{array[1]}{list(array[0])}"
