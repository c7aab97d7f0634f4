"""The checkpoints of a run in training, which another process, mesh or strategy can go on from."""

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
    """Checkpoints in a folder, each in a folder of its own that has the number of its step, written by Orbax.

    They are written beside the training, by threads of their own, under another name until they are complete. So
    the last complete one can always be read, whenever the process or the machine ends. An array is stored as one,
    wherever its parts were, and read into whatever parts are wanted. It takes the extra `train`.

    **Arguments:**

    - `folder`: where they are, or will be.
    - `about`: what a run must have in common with its checkpoints to go on from them, by name; in JSON's types.
    - `keep`: how many of the newest to keep.

    **Raises:** `ValueError` if Orbax is not installed, or `keep` is less than 1.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], *, keep: int = 2):
        if keep < 1:
            raise InputError(f"A run cannot keep {keep} checkpoints; keep at least 1.")
        if importlib.util.find_spec("orbax") is None:
            raise InputError("To keep checkpoints of a run takes the extra `train`: pip install 'mistral-eqx[train]'.")
        # It takes seconds to import, which only who keeps checkpoints should wait for.
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        # What JSON gives back: tuples are lists there.
        self._about = json.loads(json.dumps(about))
        self._args = ocp.args
        # What was cut off while it was written is taken away when the next run begins.
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
        """Begins to write a checkpoint, and returns once the state may change again.

        **Arguments:**

        - `state`: what a step returned.
        - `more`: what else to keep, in JSON's types.

        **Returns:** the step.

        **Raises:** `ValueError` if this or the one before cannot be written; those that were complete are still there.
        """
        step = int(state.steps)
        items = self._args.Composite(
            state=self._args.StandardSave(_by_name(state)),
            about=self._args.JsonSave(self._about),
            more=self._args.JsonSave(dict(more)),
        )
        with self._told():
            # A run that stops where it saved anyway has nothing to add.
            if step not in self._manager.all_steps():
                self._manager.save(step, args=items, force=True)
        return step

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest checkpoint, or if that is damaged the newest one that is not, with a warning.

        **Arguments:**

        - `state`: a fresh state, on any mesh and in any parts; it is overwritten.

        **Returns:** the state with the checkpoint's numbers, in the same parts, and what else was kept.

        **Raises:** `ValueError` if the checkpoint is of another model or another optimizer.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise InputError(f"There is no checkpoint in {self.folder}; train first, or name another folder.")
        for step in steps:
            try:
                found = self._restore(step, state)
            except (InputError, MemoryError, jax.errors.JaxRuntimeError):  # the files are not to blame
                raise
            except Exception as error:  # Orbax and what it builds on raise errors of any kind for damaged files
                damaged = f"The checkpoint of step {step} in {self.folder} is damaged ({type(error).__name__})"
                if step == steps[-1]:
                    raise InputError(
                        f"{damaged}, and none before it can be read; delete the folder to begin anew.",
                        file=self.folder,
                    ) from error
                warnings.warn(f"{damaged} and put aside; the one before it is read.", stacklevel=2)
                self._put_aside(step)
            else:
                return found
        raise AssertionError("a step is read, or the last one raised")

    def _put_aside(self, step: int):
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(self.folder / f"damaged-{step}-{uuid.uuid4().hex[:8]}")
        self._manager.reload()

    def _restore(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        found = self._manager.restore(
            step, args=self._args.Composite(about=self._args.JsonRestore(), more=self._args.JsonRestore())
        )
        for name in {**found["about"], **self._about}:
            then, now = found["about"].get(name), self._about.get(name)
            if then != now:
                raise InputError(
                    f"The checkpoint in {self.folder} was written by a run with {name} {then!r}, and this one has "
                    f"{now!r}; give it a folder of its own."
                )
        arrays = _by_name(state)
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in arrays.items()
        }
        self._check(step, wanted)
        for leaf in arrays.values():
            if not leaf.is_deleted():
                leaf.delete()  # so that there is never more than one state
        read = self._manager.restore(step, args=self._args.Composite(state=self._args.StandardRestore(wanted)))["state"]
        return _named(state, read), found["more"]

    def wait(self):
        """Returns when all checkpoints are complete.

        **Raises:** `ValueError` if one cannot be written.
        """
        with self._told():
            self._manager.wait_until_finished()

    def close(self):
        """Waits, and lets go of the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]):
        metadata: Any = self._manager.item_metadata(step)["state"].tree
        then = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in metadata.items()}
        now = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in wanted.items()}
        for name in {**now, **then}:
            if then.get(name) != now.get(name):
                raise InputError(
                    f"The checkpoint in {self.folder} has {_listed(then.get(name))} for {name!r}, and this run has "
                    f"{_listed(now.get(name))}; give it a folder of its own, or the same model and optimizer."
                )

    def _told(self):
        return _Told(self)


class _Told:
    """Says in one sentence what Orbax could not write, and what is still there."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def __enter__(self):
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any):
        # The threads that write hand over errors of several kinds, those of the file system among them.
        if isinstance(error, Exception):
            latest = self._checkpoints.latest
            there = "There is no complete one yet" if latest is None else f"That of step {latest} is complete"
            reason = " ".join(str(error).split())
            reason = reason if len(reason) < 120 else f"{reason[:60]} ... {reason[-55:]}"
            raise InputError(
                f"A checkpoint could not be written to {self._checkpoints.folder}: {reason}. {there}; make room, or "
                "mend what is wrong there, and train on."
            ) from error


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


def _listed(array: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if array is None else f"{array[1]}{list(array[0])}"
