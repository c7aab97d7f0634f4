"""Training from the first step to the last, which goes on where it was ended."""

import contextlib
import dataclasses
import itertools
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from ..checks import Count, NotNegative, Positive, Seed, ShareBelowOne, checked, kinds_of
from ..errors import InputError
from ..nn import Mistral
from .batch import Batch
from .callback import Callback, Run
from .callbacks import CSV, ProgressBar
from .callbacks.best import BEST
from .checkpoints import Checkpoints
from .evaluation import Evaluation, make_evaluation
from .lock import alone
from .loss import Sums
from .step import Metrics, Step, TrainState, make_step
from .stopping import Stopping
from .throughput import flops_per_token, peak_flops


@runtime_checkable
class _Resumable(Protocol):
    """An iterator that can tell where it is, as Grain's can."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Makes steps, and what goes with them: checkpoints, evaluation, figures.

    ```python
    trainer = mx.Trainer(mx.train.adamw(3e-4), checkpoint_dir="runs/a", evaluate_on=held_out)
    model = trainer.fit(model, batches, steps=1000)  # goes on if the folder holds a run
    ```

    **Arguments:**

    - `optimizer`: as of [`mistral_eqx.train.make_step`][], and so are `compute_dtype`, `accumulate`, `clip`, `remat`,
        `label_smoothing`, `z_loss` and `seed`.
    - `dtype`, `zero`, `offload`: as of [`mistral_eqx.train.TrainState`][]'s `init`.
    - `checkpoint_dir`: the run's folder. It gets checkpoints, and `training.csv` and `evaluation.csv`. Takes the extra
        `train`. Without it nothing is written, and a run that ends is gone.
    - `save_every`: after how many steps to write a checkpoint; one is also written after the last step, at ctrl-C and
        at SIGTERM.
    - `keep`: how many checkpoints to keep.
    - `evaluate_on`: batches to measure the loss on, gone through from the beginning each time.
    - `evaluate_every`: after how many steps to do so; also after the last one.
    - `log_every`: after how many steps to look at figures, for which the host waits for the device.
    - `callbacks`: what else to do.
    - `progress`: whether there is a bar, if there is a terminal.
    - `allow_changes`: whether a run may go on with other batches, another `accumulate` or another `seed`. If the
        batches are others they begin at the first one.
    """

    optimizer: optax.GradientTransformation
    _: dataclasses.KW_ONLY
    compute_dtype: DTypeLike | None = jnp.bfloat16
    accumulate: Count = 1
    clip: Positive | None = 1.0
    remat: str = "block"
    label_smoothing: ShareBelowOne = 0.0
    z_loss: NotNegative = 0.0
    dtype: DTypeLike = jnp.float32
    zero: int = 0
    offload: bool = False
    seed: Seed = 0
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

    def fit(self, model: Mistral, batches: Iterable[Batch], *, steps: int | None = None) -> Mistral:
        """Trains a model.

        Where `checkpoint_dir` holds a run, it goes on from the newest checkpoint, to the same numbers as if it had
        never ended: weights and optimizer state are read, on whatever mesh the model is now, and batches go on where
        they were. Those of [`mistral_eqx.train.data.batches`][], and others that can tell where they are as Grain's do,
        are set there; of others those that were used are passed over.

        **Arguments:**

        - `model`: on one device or on a mesh. In a model with adapters these alone are trained.
        - `batches`: in order; of several processes each gives its own rows.
        - `steps`: how many steps the run has, those before it went on included; as many as there are batches, unless
            given.

        **Returns:** the trained model.

        **Raises:** `ValueError` if there is no batch, they end before `steps` are made, a batch has ids that are not in
        the vocabulary, rows longer than the model's context or no rows for each device; if the checkpoints are of
        another run; or if one cannot be written.
        """
        state = self._state(model)
        run = Run(state, 0, steps, None if self.checkpoint_dir is None else Path(self.checkpoint_dir).absolute())
        callbacks = [*self._own_callbacks(), *self.callbacks]
        with contextlib.ExitStack() as stack:
            checkpoints = None
            if run.folder is not None:
                stack.enter_context(alone(run.folder))
                checkpoints = stack.enter_context(contextlib.closing(self._checkpoints(run.folder, model)))
            iterator = iter(batches)
            order, begun = self._order(batches), 0
            if checkpoints is not None and checkpoints.latest is not None:
                begun = self._go_on(run, checkpoints, iterator, callbacks, order)
            stopping = stack.enter_context(Stopping())
            for callback in callbacks:
                stack.callback(callback.on_end, run)
                callback.on_start(run)
            self._train(run, iterator, checkpoints, callbacks, stopping, {"order": order, "begun": begun})
        stopping.end()
        if steps is not None and run.step < steps and not run.stop:
            raise InputError(
                f"The batches ended after {run.step} of {steps} steps; give as many as there are steps, or an iterable "
                "that begins again."
            )
        return run.model()

    def restore(self, model: Mistral, *, best: bool = False) -> Mistral:
        """Reads the model of the newest checkpoint, or of the best one, without training.

        **Arguments:**

        - `model`: one of the same shapes, on whatever mesh is wanted.
        - `best`: whether to read what [`mistral_eqx.train.KeepBest`][] kept.

        **Raises:** `ValueError` if there is no such checkpoint, or it is of another model.
        """
        if self.checkpoint_dir is None:
            raise InputError("This trainer keeps no checkpoints; give it the checkpoint_dir of the run.")
        folder = Path(self.checkpoint_dir) / BEST if best else Path(self.checkpoint_dir)
        if not folder.is_dir():
            raise InputError(f"There is no checkpoint in {folder}; train first, or name another folder.")
        state = self._state(model)
        with contextlib.closing(Checkpoints(folder, {}) if best else self._checkpoints(folder, model)) as checkpoints:
            return checkpoints.restore(state)[0].unstacked()

    def _state(self, model: Mistral) -> TrainState:
        return TrainState.init(model, self.optimizer, dtype=self.dtype, zero=self.zero, offload=self.offload)

    def _own_callbacks(self) -> list[Callback]:
        return [
            *([CSV()] if self.checkpoint_dir is not None else []),
            *([ProgressBar()] if self.progress else []),
        ]

    def _checkpoints(self, folder: Path, model: Mistral) -> Checkpoints:
        about = {f"the config's {name}": value for name, value in dataclasses.asdict(model.config).items()}
        return Checkpoints(folder, about, keep=self.keep)

    def _order(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """What a run that goes on must have in common with itself, by what a message calls it, in JSON's types."""
        known = {f"the batches' {name}": value for name, value in getattr(batches, "order", {}).items()}
        held_out = getattr(self.evaluate_on, "order", {})
        known |= {f"the held-out batches' {name}": value for name, value in held_out.items()}
        return known | {"the trainer's accumulate": self.accumulate, "the trainer's seed": self.seed}

    def _go_on(
        self,
        run: Run,
        checkpoints: Checkpoints,
        iterator: Iterator[Batch],
        callbacks: Sequence[Callback],
        order: Mapping[str, Any],
    ) -> int:
        """Sets a run to where it ended, and returns at which step its batches began."""
        run.state, more = checkpoints.restore(run.state)
        run.step = int(run.state.steps)
        then, begun = more.get("order") or {}, more.get("begun", 0)
        changed = [name for name in then if name in order and then[name] != order[name]]
        others = any(name.startswith("the batches'") for name in changed)
        if changed:
            what = ", ".join(
                name if name.endswith("batches' examples") else f"{name} {then[name]!r}, now {order[name]!r}"
                for name in changed
            )
            if not self.allow_changes:
                raise InputError(
                    f"The run in {run.folder} was made with other values: {what}; give what it began with, a folder of "
                    "its own, or allow changes (allow_changes=True, --allow-changes).",
                    file=run.folder,
                )
            begins = ", and the batches begin at the first one" if others else ""
            warnings.warn(f"The run in {run.folder} goes on with other values: {what}{begins}.", stacklevel=3)
        if others:
            begun = run.step
        elif more["position"] is not None and isinstance(iterator, _Resumable):
            iterator.set_state(_position(more["position"]))
        else:
            passed = sum(1 for _ in itertools.islice(iterator, run.step - begun))
            if passed < run.step - begun:
                raise InputError(
                    f"The run made {run.step} steps, and there are {passed} batches; give those that it began with."
                )
        # Other callbacks may have come or gone; of those of one name the order counts.
        kept: dict[str, list[dict[str, Any]]] = {}
        for name, state in more["callbacks"]:
            kept.setdefault(name, []).append(state)
        for callback in callbacks:
            if states := kept.get(type(callback).__name__):
                callback.set_state(states.pop(0))
        return begun

    def _train(
        self,
        run: Run,
        iterator: Iterator[Batch],
        checkpoints: Checkpoints | None,
        callbacks: Sequence[Callback],
        stopping: Stopping,
        about: Mapping[str, Any],
    ):
        step, evaluation = self._step(), make_evaluation(compute_dtype=self.compute_dtype)
        clock = _Clock()
        begin = run.step

        def save():
            if checkpoints is not None:
                state = iterator.get_state() if isinstance(iterator, _Resumable) else None
                kept = [(type(callback).__name__, callback.get_state()) for callback in callbacks]
                checkpoints.save(run.state, {"position": _json(state), "callbacks": kept, **about})
                for callback in callbacks:
                    callback.on_checkpoint(run)

        done = run.steps is not None and run.step >= run.steps
        while not done:
            batch = next(iterator, None)
            if batch is None:
                break
            _check(batch, run.state)
            placed = _placed(batch, run.state)
            run.state, metrics = step(run.state, placed)
            run.step += 1
            # Each process sees its own rows, which may be all there are.
            clock.count(batch, placed.inputs.shape[0] // batch.inputs.shape[0])
            for callback in callbacks:
                callback.on_step(run, metrics)
            done = stopping.wanted(run.step) or run.stop or run.step == run.steps
            if done or run.step % self.log_every == 0 or run.step == begin + 1:
                figures = _figures(metrics, run.state) | clock.figures(run.state, batch, self.compute_dtype)
                for callback in callbacks:
                    callback.on_log(run, figures)
                # Compiling is not work.
                clock.begin()
            if self.evaluate_on is not None and (run.step % self.evaluate_every == 0 or run.step == run.steps):
                figures = _evaluated(evaluation, run.state, self.evaluate_on)
                for callback in callbacks:
                    callback.on_evaluation(run, figures)
                done = done or run.stop
                clock.begin()
            if run.step % self.save_every == 0 and not done:
                save()
                clock.begin()
        if run.step == 0:
            raise InputError("There are no batches to train on; give at least one.")
        save()

    def _step(self) -> Step:
        return make_step(
            self.optimizer,
            compute_dtype=self.compute_dtype,
            accumulate=self.accumulate,
            clip=self.clip,
            remat=self.remat,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            seed=self.seed,
        )


_CHECKED = (
    "accumulate",
    "clip",
    "label_smoothing",
    "z_loss",
    "seed",
    "save_every",
    "keep",
    "evaluate_every",
    "log_every",
)


class _Clock:
    """Measures what is done between two looks at the figures."""

    def __init__(self):
        self._peak: float | None = None
        self._start: float | None = None
        self._tokens = 0

    def begin(self):
        self._start, self._tokens = time.perf_counter(), 0

    def count(self, batch: Batch, shares: int):
        self._tokens += int(np.sum(np.asarray(batch.positions) >= 0)) * shares

    def figures(self, state: TrainState, batch: Batch, dtype: DTypeLike | None) -> dict[str, float]:
        """Tokens a second, and the part of the devices' measured peak that this is; NaN before there is a start."""
        if self._start is None:
            return {"tokens_per_second": math.nan, "mfu": math.nan}
        rate = self._tokens / (time.perf_counter() - self._start)
        if self._peak is None:
            mesh = state.model.outer.mesh
            self._peak = peak_flops(state.model.outer.dtype if dtype is None else dtype)
            # Virtual devices share one processor.
            if mesh is not None and mesh.devices.flat[0].platform != "cpu":
                self._peak *= mesh.size
        return {
            "tokens_per_second": rate,
            "mfu": rate * flops_per_token(state.model, batch.inputs.shape[1]) / self._peak,
        }


def _figures(metrics: Metrics, state: TrainState) -> dict[str, float]:
    names = ("loss", "cross_entropy", "accuracy", "gradient_norm")
    figures = {name: float(getattr(metrics, name)) for name in names}
    return figures | {"skipped": float(state.skipped)}


def _evaluated(evaluation: Evaluation, state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
    total: Sums | None = None
    for batch in batches:
        _check(batch, state)
        sums = evaluation(state, _placed(batch, state))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None or float(total.weight) == 0:
        raise InputError(
            "There is nothing to evaluate on: no batch has a token that counts; give some, or leave it out."
        )
    loss = float(total.cross_entropy / total.weight)
    return {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "accuracy": float(total.correct / total.weight),
        "tokens": float(total.weight),
    }


def _check(batch: Batch, state: TrainState):
    """Refuses what the model would take without a word; ids in arrays of JAX are not waited for."""
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
                f"A batch has the id {wrong}, and the model's vocabulary {config.vocab} entries; take the tokenizer "
                "that belongs to the model."
            )


def _placed(batch: Batch, state: TrainState) -> Batch:
    """Rows of all processes as one array; those of one process are placed by the step."""
    mesh = state.model.outer.mesh
    if jax.process_count() == 1 or mesh is None:
        return batch
    sharding = NamedSharding(mesh, state.strategy.spec("batch seq"))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def _json(state: Any) -> Mapping[str, Any] | None:
    """Where an iterator is, in JSON's types: Grain's loaders tell it in bytes."""
    if state is None:
        return None
    if isinstance(state, bytes):
        return {"text": state.decode()}
    return {"value": json.loads(json.dumps(state))}


def _position(state: Mapping[str, Any]) -> Any:
    return state["text"].encode() if "text" in state else state["value"]
