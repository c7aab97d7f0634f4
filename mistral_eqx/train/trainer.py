"""The training loop, with checkpoints, evaluation and callbacks; a run continues from its newest checkpoint."""

import contextlib
import dataclasses
import itertools
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from ..checks import Count, NotNegative, Positive, Seed, ShareBelowOne, checked, kinds_of
from ..errors import InputError
from ..nn import Mistral, Stacked
from .batch import Batch
from .callback import Callback, Run
from .callbacks import CSV, ProgressBar
from .callbacks.best import BEST
from .checkpoints import Checkpoints
from .disk import DiskCheckpoints, DiskStep, complete_steps, keeping_gradients
from .evaluation import Evaluation, make_evaluation
from .lock import lock_folder
from .loss import Sums
from .step import Metrics, Schedule, Step, TrainState, make_step
from .stopping import Stopping
from .throughput import flops_per_token, peak_flops


@runtime_checkable
class _Resumable(Protocol):
    """An iterator whose position can be saved and restored, as Grain's can."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains a model, with checkpoints, evaluation and metrics.

    ```python
    trainer = mx.Trainer(mx.train.adamw(3e-4), checkpoint_dir="runs/a", evaluate_on=held_out)
    model = trainer.fit(model, batches, steps=1000)  # continues if the folder holds a run
    ```

    **Arguments:**

    - `optimizer`, `compute_dtype`, `accumulate`, `clip`, `remat`, `label_smoothing`, `z_loss`, `balance_loss`,
        `router_z_loss`, `capacity`, `seed`, `schedule`: as for [`mistral_eqx.train.make_step`][].
    - `dtype`, `zero`, `offload`: as for [`mistral_eqx.train.TrainState`][]'s `init`. With `offload="disk"`, master
        weights and optimizer state are the files of a [`mistral_eqx.train.DiskStep`][], in the folder `disk` of
        `checkpoint_dir`. Each step is then a checkpoint, and `dtype` is the precision of weights and gradients in
        memory.
    - `checkpoint_dir`: the run's folder, for checkpoints, `training.csv` and `evaluation.csv`. It needs the extra
        `train`. Without it nothing is written, and an interrupted run cannot continue.
    - `save_every`: the number of steps between two checkpoints; the trainer also saves one after the last step, at
        ctrl-C and at SIGTERM.
    - `keep`: the number of checkpoints to keep.
    - `evaluate_on`: the held-out batches; each evaluation iterates over all of them.
    - `evaluate_every`: the number of steps between two evaluations; there is also one after the last step.
    - `log_every`: the number of steps between two calls of `on_log`, for which the host waits for the device.
    - `callbacks`: see [`mistral_eqx.train.Callback`][].
    - `progress`: whether to show a bar, if there is a terminal.
    - `allow_changes`: whether a run may continue with other batches, another `accumulate` or another `seed`. Other
        batches start at the first one.
    """

    optimizer: optax.GradientTransformation
    _: dataclasses.KW_ONLY
    compute_dtype: DTypeLike | None = jnp.bfloat16
    accumulate: Count = 1
    clip: Positive | None = 1.0
    remat: str = "block"
    label_smoothing: ShareBelowOne = 0.0
    z_loss: NotNegative = 0.0
    balance_loss: NotNegative = 0.0
    router_z_loss: NotNegative = 0.0
    capacity: Positive | None = None
    dtype: DTypeLike = jnp.float32
    zero: int = 0
    offload: bool | Literal["disk"] = False
    seed: Seed = 0
    schedule: Schedule = "gpipe"
    checkpoint_dir: str | Path | None = None
    save_every: Count = 500
    keep: Count = 2
    evaluate_on: Iterable[Batch] | None = None
    evaluate_every: Count = 500
    log_every: Count = 10
    callbacks: Sequence[Callback] = ()
    progress: bool = True
    allow_changes: bool = False

    def __post_init__(self):
        for name in _CHECKED:
            checked(getattr(self, name), kinds_of(Trainer)[name], f"The trainer's {name}", key=name)
        if self.offload == "disk" and self.checkpoint_dir is None:
            raise InputError(
                "The trainer's offload is 'disk', which keeps the state of training in the run's folder; give it a "
                "checkpoint_dir.",
                key="checkpoint_dir",
            )
        if self.offload == "disk" and self.zero:
            raise InputError(
                f"The trainer's offload is 'disk', for one device, and zero={self.zero} shards the state over several; "
                "leave one of them out.",
                key="zero",
            )

    def fit(self, model: Mistral | Stacked, batches: Iterable[Batch], *, steps: int | None = None) -> Mistral:
        """Trains a model.

        If `checkpoint_dir` holds a run, the run continues from its newest checkpoint, with the same results as if it
        had never ended. The trainer reads weights and optimizer state onto the mesh of `model`, and restores the
        position of the batches. This needs an iterator with `get_state` and `set_state`, as those of
        [`mistral_eqx.train.data.batches`][] and of Grain have; of other iterators the trainer skips the used batches.

        **Arguments:**

        - `model`: a model on one device or on a mesh, stacked where the strategy splits `layers`. If it has adapters,
            only these are trained; otherwise its weights must not be quantized.
        - `batches`: the batches in order; with several processes, each gives its own rows.
        - `steps`: the number of steps of the whole run, those before it continued included; unless given, training ends
            with the batches.

        **Returns:** the trained model.

        **Raises:** `ValueError` if there is no batch, the batches end before `steps`, a batch has an id outside the
        vocabulary, rows longer than the model's context or rows that the devices do not divide, the checkpoints belong
        to another run, or a checkpoint cannot be written.
        """
        given = [model]
        del model
        return self._fit(given, batches, steps).unstacked()

    def fit_state(self, model: Mistral | Stacked, batches: Iterable[Batch], *, steps: int | None = None) -> TrainState:
        """Trains a model as `fit` does, and returns the last state.

        In its model the blocks are stacked, and each stage of a pipeline has its own layers alone.
        """
        given = [model]
        del model
        return self._fit(given, batches, steps)

    def _fit(self, given: list[Mistral | Stacked], batches: Iterable[Batch], steps: int | None) -> TrainState:
        """Trains the model that a list gives, and removes it there, so that memory need not hold it any longer."""
        folder = None if self.checkpoint_dir is None else Path(self.checkpoint_dir).absolute()
        step = self._step(folder)
        callbacks = [*self._own_callbacks(), *self.callbacks]
        with contextlib.ExitStack() as stack:
            if folder is not None:
                stack.enter_context(lock_folder(folder))
                _check_offload(folder, self.offload)
            state, checkpoints = self._begin(given.pop(), folder, step)
            if checkpoints is not None:
                stack.enter_context(contextlib.closing(checkpoints))
            run = Run(state, 0, steps, folder)
            iterator = iter(batches)
            order, first_step = self._order(batches), 0
            if checkpoints is not None and checkpoints.latest is not None:
                first_step = self._resume(run, checkpoints, iterator, callbacks, order)
            stopping = stack.enter_context(Stopping())
            for callback in callbacks:
                stack.callback(callback.on_end, run)
                callback.on_start(run)
            self._train(run, iterator, step, checkpoints, callbacks, stopping, {"order": order, "begun": first_step})
        stopping.end()
        if steps is not None and run.step < steps and not run.stop:
            raise InputError(
                f"The batches ended after {run.step} of {steps} steps; give one for each step, or an iterable that "
                "starts again."
            )
        return run.state

    def restore(self, model: Mistral | Stacked, *, best: bool = False) -> Mistral:
        """Reads the model of the newest checkpoint, or of the best one, without training.

        **Arguments:**

        - `model`: a model of the same shapes, on any mesh.
        - `best`: whether to read the checkpoint that [`mistral_eqx.train.KeepBest`][] kept.

        **Raises:** `ValueError` if there is no such checkpoint, or it belongs to another model.
        """
        if self.checkpoint_dir is None:
            raise InputError(
                "This trainer has no checkpoint_dir to read a checkpoint from; give it the checkpoint_dir of the run."
            )
        whole = Path(self.checkpoint_dir)
        folder = whole / BEST if best else whole / DISK if self.offload == "disk" else whole
        on_disk = self.offload == "disk" and not best
        if not folder.is_dir() or (on_disk and not complete_steps(folder)):
            raise InputError(f"There is no checkpoint in {folder}; train first, or name another folder.")
        _check_offload(whole, self.offload)
        with contextlib.ExitStack() as stack:
            if best:
                state, checkpoints = self._state(model), Checkpoints(folder, {})
            else:
                step = self._step(whole)
                # The next step of a run would write over its files while they are read.
                stack.enter_context(lock_folder(whole) if on_disk else contextlib.nullcontext())
                state, checkpoints = self._begin(model, whole, step)
            assert checkpoints is not None
            stack.enter_context(contextlib.closing(checkpoints))
            return checkpoints.restore(state)[0].unstacked()

    def _begin(
        self, model: Mistral | Stacked, folder: Path | None, step: Step | DiskStep
    ) -> tuple[TrainState, Checkpoints | DiskCheckpoints | None]:
        """The state before the first step of a new run, or for `restore`; and the checkpoints."""
        about = {f"the config's {name}": value for name, value in dataclasses.asdict(model.config).items()}
        if isinstance(step, DiskStep):
            return step.init(model, dtype=self.dtype), DiskCheckpoints(step, about)
        return self._state(model), None if folder is None else Checkpoints(folder, about, keep=self.keep)

    def _state(self, model: Mistral | Stacked) -> TrainState:
        optimizer = keeping_gradients() if self.offload == "disk" else self.optimizer
        return TrainState.init(model, optimizer, dtype=self.dtype, zero=self.zero, offload=self.offload is True)

    def _own_callbacks(self) -> list[Callback]:
        return [
            *([CSV()] if self.checkpoint_dir is not None else []),
            *([ProgressBar()] if self.progress else []),
        ]

    def _order(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """The values that must not change when a run continues, as JSON types, by their names in error messages."""
        order = {f"the batches' {name}": value for name, value in getattr(batches, "order", {}).items()}
        held_out = getattr(self.evaluate_on, "order", {})
        order |= {f"the held-out batches' {name}": value for name, value in held_out.items()}
        return order | {"the trainer's accumulate": self.accumulate, "the trainer's seed": self.seed}

    def _resume(
        self,
        run: Run,
        checkpoints: Checkpoints | DiskCheckpoints,
        iterator: Iterator[Batch],
        callbacks: Sequence[Callback],
        order: Mapping[str, Any],
    ) -> int:
        """Restores a run from its newest checkpoint; returns the step at which its batches began."""
        run.state, more = checkpoints.restore(run.state)
        run.step = int(run.state.steps)
        saved, first_step = more.get("order") or {}, more.get("begun", 0)
        changed = [name for name in saved if name in order and saved[name] != order[name]]
        new_batches = any(name.startswith("the batches'") for name in changed)
        if changed:
            changes = ", ".join(
                name if name.endswith("batches' examples") else f"{name} {saved[name]!r}, now {order[name]!r}"
                for name in changed
            )
            if not self.allow_changes:
                raise InputError(
                    f"The run in {run.folder} began with other values: {changes}; give the same values, use another "
                    "folder, or allow changes (allow_changes=True, --allow-changes).",
                    file=run.folder,
                )
            restart = ", and the batches start at the first one" if new_batches else ""
            warnings.warn(f"The run in {run.folder} continues with other values: {changes}{restart}.", stacklevel=3)
        if new_batches:
            first_step = run.step
        elif more["position"] is not None and isinstance(iterator, _Resumable):
            iterator.set_state(_position(more["position"]))
        else:
            skipped = sum(1 for _ in itertools.islice(iterator, run.step - first_step))
            if skipped < run.step - first_step:
                raise InputError(
                    f"The run has done {run.step} steps, and there are only {skipped} batches; give the same batches."
                )
        # Callbacks may have been added or removed; several of one class are matched in order.
        states: dict[str, list[dict[str, Any]]] = {}
        for name, state in more["callbacks"]:
            states.setdefault(name, []).append(state)
        for callback in callbacks:
            if of_class := states.get(type(callback).__name__):
                callback.set_state(of_class.pop(0))
        return first_step

    def _train(
        self,
        run: Run,
        iterator: Iterator[Batch],
        step: Step | DiskStep,
        checkpoints: Checkpoints | DiskCheckpoints | None,
        callbacks: Sequence[Callback],
        stopping: Stopping,
        about: Mapping[str, Any],
    ):
        evaluation, clock = make_evaluation(compute_dtype=self.compute_dtype), _Clock()
        # What a step wrote counts only after the callbacks have seen it.
        make, save_every = (step.unmarked, 1) if isinstance(step, DiskStep) else (step, self.save_every)
        start = run.step

        def save():
            if checkpoints is not None:
                position = iterator.get_state() if isinstance(iterator, _Resumable) else None
                states = [(type(callback).__name__, callback.get_state()) for callback in callbacks]
                checkpoints.save(run.state, {"position": _json(position), "callbacks": states, **about})
                for callback in callbacks:
                    callback.on_checkpoint(run)

        done = run.steps is not None and run.step >= run.steps
        while not done:
            batch = next(iterator, None)
            if batch is None:
                break
            _check(batch, run.state)
            whole = _global_batch(batch, run.state)
            run.state, metrics = make(run.state, whole)
            run.step += 1
            # `batch` has the rows of this process alone.
            clock.count(batch, whole.inputs.shape[0] // batch.inputs.shape[0])
            for callback in callbacks:
                callback.on_step(run, metrics)
            done = stopping.requested(run.step) or run.stop or run.step == run.steps
            if done or run.step % self.log_every == 0 or run.step == 1:
                logged = _floats(metrics, run.state) | clock.metrics(run.state, batch, self.compute_dtype)
                for callback in callbacks:
                    callback.on_log(run, logged)
                clock.start()
            elif run.step == start + 1:
                # Starting the clock after this step leaves out the time to compile.
                jax.block_until_ready(metrics)
                clock.start()
            if self.evaluate_on is not None and (run.step % self.evaluate_every == 0 or run.step == run.steps):
                with clock.paused(metrics):
                    evaluated = _evaluate(evaluation, run.state, self.evaluate_on)
                    for callback in callbacks:
                        callback.on_evaluation(run, evaluated)
                done = done or run.stop
            if run.step % save_every == 0 and not done:
                with clock.paused(metrics):
                    save()
        if run.step == 0:
            raise InputError("There are no batches to train on; give at least one.")
        save()

    def _step(self, folder: Path | None) -> Step | DiskStep:
        options: dict[str, Any] = {
            "compute_dtype": self.compute_dtype,
            "accumulate": self.accumulate,
            "clip": self.clip,
            "remat": self.remat,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "balance_loss": self.balance_loss,
            "router_z_loss": self.router_z_loss,
            "capacity": self.capacity,
            "seed": self.seed,
            "schedule": self.schedule,
        }
        if self.offload == "disk" and folder is not None:
            return DiskStep(self.optimizer, folder / DISK, **options)
        return make_step(self.optimizer, **options)


# The folder of a DiskStep in that of the run.
DISK = "disk"

_CHECKED = (
    "offload",
    "accumulate",
    "clip",
    "label_smoothing",
    "z_loss",
    "balance_loss",
    "router_z_loss",
    "capacity",
    "seed",
    "schedule",
    "save_every",
    "keep",
    "evaluate_every",
    "log_every",
)


def _check_offload(folder: Path, offload: bool | str):
    """Refuses a folder whose run keeps its state in another way: it would begin again."""
    on_disk = complete_steps(folder / DISK) > 0
    if on_disk and offload != "disk":
        raise InputError(
            f"The run in {folder} keeps its state in files of offload='disk'; continue with it, or use another folder.",
            file=folder,
            key="offload",
        )
    if offload == "disk" and not on_disk and any(path.name.isdigit() for path in folder.glob("*")):
        raise InputError(
            f"The run in {folder} has checkpoints, from which offload='disk' cannot continue; leave it out, or use "
            "another folder.",
            file=folder,
            key="offload",
        )


class _Clock:
    """Measures the throughput between two calls of `on_log`."""

    def __init__(self):
        self._peak: float | None = None
        self._start: float | None = None
        self._tokens = 0

    def start(self):
        self._start, self._tokens = time.perf_counter(), 0

    @contextlib.contextmanager
    def paused(self, metrics: Metrics) -> Iterator[None]:
        """Leaves out the time inside this context; `metrics` are of the last step, which ends before."""
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        yield
        if self._start is not None:
            self._start += time.perf_counter() - start

    def count(self, batch: Batch, processes: int):
        self._tokens += int(np.sum(np.asarray(batch.positions) >= 0)) * processes

    def metrics(self, state: TrainState, batch: Batch, dtype: DTypeLike | None) -> dict[str, float]:
        """Tokens per second and MFU, relative to the measured peak of the devices; NaN before the clock was started."""
        if self._start is None:
            return {"tokens_per_second": math.nan, "mfu": math.nan}
        rate = self._tokens / (time.perf_counter() - self._start)
        if self._peak is None:
            mesh = state.model.outer.mesh
            self._peak = peak_flops(state.model.outer.dtype if dtype is None else dtype)
            # Virtual CPU devices share one processor.
            if mesh is not None and mesh.devices.flat[0].platform != "cpu":
                self._peak *= mesh.size
        return {
            "tokens_per_second": rate,
            "mfu": rate * flops_per_token(state.model, batch.inputs.shape[1]) / self._peak,
        }


def _floats(metrics: Metrics, state: TrainState) -> dict[str, float]:
    of_routers = ("router_balance", "router_z", "router_dropped")
    of_routers = () if state.model.outer.config.routing is None else of_routers
    names = ("loss", "cross_entropy", "accuracy", "gradient_norm", *of_routers)
    floats = {name: float(getattr(metrics, name)) for name in names}
    return floats | {"skipped": float(state.skipped)}


def _evaluate(evaluation: Evaluation, state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
    total: Sums | None = None
    for batch in batches:
        _check(batch, state)
        sums = evaluation(state, _global_batch(batch, state))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None or float(total.weight) == 0:
        raise InputError(
            "There is nothing to evaluate on: no batch has a target with weight; give others, or leave evaluate_on out."
        )
    loss = float(total.cross_entropy / total.weight)
    return {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "accuracy": float(total.correct / total.weight),
        "tokens": float(total.weight),
    }


def _check(batch: Batch, state: TrainState):
    """Refuses ids and lengths that the model would accept silently; ids in JAX arrays are not checked, to not wait."""
    config = state.model.outer.config
    seq = batch.inputs.shape[1]
    if seq > config.max_positions:
        raise InputError(
            f"The rows of the batches have {seq} columns, and the model's context is {config.max_positions} tokens; "
            "make the rows shorter."
        )
    for ids in (batch.inputs, batch.targets):
        if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < config.vocab:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(
                f"A batch has the id {wrong}, and the model's vocabulary has {config.vocab} entries; use the tokenizer "
                "of the model."
            )


def _global_batch(batch: Batch, state: TrainState) -> Batch:
    """The rows of all processes as global arrays; with one process, the step puts them on the devices."""
    mesh = state.model.outer.mesh
    if jax.process_count() == 1 or mesh is None:
        return batch
    sharding = NamedSharding(mesh, state.strategy.spec("batch"))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def _json(state: Any) -> Mapping[str, Any] | None:
    """The state of an iterator as JSON types; Grain's loaders return bytes."""
    if state is None:
        return None
    if isinstance(state, bytes):
        return {"text": state.decode()}
    return {"value": json.loads(json.dumps(state))}


def _position(state: Mapping[str, Any]) -> Any:
    return state["text"].encode() if "text" in state else state["value"]
