"""All layouts of a model on some chips, ranked by estimates in closed form: nothing is compiled."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from ..checks import CacheDType, Count, checked
from ..config import MistralConfig
from ..errors import InputError
from ..generation.reading import CHUNK
from ..nn.slots import slots_for
from ..parallel import NAMED, SINGLE, Choice, strategies
from ..parallel.mesh import show
from ..quant import Recipe
from .arguments import DTypes, chip_of, count_devices, lengths_of, named
from .chips import Chip
from .communication import Collective, decoding_step, prefill
from .fitting import SHARE
from .limits import roofline
from .report import Exchange, Memory, Roofline
from .shapes import cache_shapes, device_bytes, split_shapes, whole_shapes
from .training import Training
from .training_communication import training_step
from .work import device_entries, operations, weights_read


Objective = Literal["latency", "throughput", "train"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A layout, and what it takes by an estimate; all of one device.

    **Attributes:**

    - `choice`: the strategy and its mesh.
    - `batch`: the number of rows, over all devices.
    - `zero`: in training, the stage of ZeRO.
    - `memory`: the bytes. Of temporary arrays, training counts the activations that blocks keep and the logits, and
        generation none.
    - `times`: the seconds for compute, memory and links, of a whole request or of a step of training.
    - `seconds`: the least time of a whole request of the batch, or of a step. The longer of compute and memory in each
        pass, and the exchanges, which a layer waits for.
    - `tokens_per_second`: new tokens, or tokens of training, of all devices.
    - `utilization`: the share of the peak operations of all devices that the weights take; in training that is the
        MFU, without the passes that are computed again.
    """

    choice: Choice
    batch: int
    zero: int | None
    memory: Memory
    times: Roofline
    seconds: float
    tokens_per_second: float
    utilization: float

    @property
    def label(self) -> str:
        """The strategy, its mesh and the stage of ZeRO, as text."""
        stage = "" if self.zero is None else f", ZeRO {self.zero}"
        return f"{self.choice.strategy.name} ({show(self.choice.axes)}{stage})"

    @property
    def options(self) -> str:
        """The options of the command line that choose this layout."""
        return f"--strategy '{self.choice.strategy.name}' --mesh {show(self.choice.axes)}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as dicts and numbers."""
        fields = {**dataclasses.asdict(self), "bound": self.times.bound, "options": self.options}
        fields["choice"] = {
            "name": self.choice.strategy.name,
            "layout": self.choice.strategy.layout,
            "axes": self.choice.axes,
        }
        fields["memory"]["total"] = self.memory.total
        return fields


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The result of [`mistral_eqx.planning.rank`][].

    **Attributes:**

    - `model`, `place`, `chip`, `devices`: what was ranked, and on what.
    - `objective`: by what.
    - `prompt`, `new_tokens`: of each row; in training, both are 0.
    - `training`: the options of training; `None` for generation.
    - `best`: the layouts that fit, the best first.
    - `too_large`: the layouts that do not fit, those that need the least memory first.
    - `refused`: the layouts that cannot be, each with the reason.
    """

    model: str
    place: str
    chip: Chip
    devices: int
    objective: Objective
    prompt: int
    new_tokens: int
    training: Training | None
    best: tuple[Estimate, ...]
    too_large: tuple[Estimate, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def room(self) -> float:
        """The bytes of a chip that may be filled."""
        return SHARE * self.chip.hbm_bytes

    def to_dict(self) -> dict[str, Any]:
        """The fields as dicts, lists and numbers."""
        lists = {name: [one.to_dict() for one in getattr(self, name)] for name in ("best", "too_large")}
        return {**dataclasses.asdict(self), **lists}


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is ranked."""

    config: MistralConfig
    chip: Chip
    devices: int
    dtype: str
    cache_dtype: CacheDType | None
    quantize: Recipe | None
    prompt: int
    new_tokens: int


def rank(
    model: MistralConfig | str,
    *,
    topology: str,
    objective: Objective = "latency",
    batch: int | None = None,
    prompt: int | None = None,
    kv_seq: int | None = None,
    dtype: str = "bfloat16",
    cache_dtype: CacheDType | None = None,
    quantize: Recipe | None = None,
    train: Training | None = None,
) -> Ranking:
    """Estimates each legal layout of a model on some chips, and ranks those that fit.

    ```python
    ranking = mx.planning.rank("7b-v0.3", topology="v5e:4x4", objective="latency")
    ranking.best[0].label, ranking.best[0].seconds
    ```

    The layouts are those of [`mistral_eqx.strategies`][], in training with each stage of ZeRO. The times are those at
    the chip's peaks, as in a [roofline](plan.md#the-roofline), so compare them with each other. [`mistral_eqx.plan`][]
    compiles one.

    **Arguments:**

    - `model`, `topology`, `prompt`, `kv_seq`, `dtype`, `cache_dtype`, `quantize`: as for [`mistral_eqx.plan`][]. A
        topology of GPUs is their name and their number, such as `"H100:8"`. A request reads the prompt, and writes new
        tokens until it fills `kv_seq`.
    - `objective`: `"latency"`, the time of a batch of requests; `"throughput"`, new tokens per second; or `"train"`,
        the time of a step.
    - `batch`: the rows over all devices. Unless given, 1 for the latency, 8 in training, and for the throughput as
        many rows as each layout has memory for, a power of two.
    - `train`: for `"train"`, the length of rows, the number of micro-batches and what is kept for the backward pass.
        Its stage of ZeRO is that which wins.

    **Returns:** the layouts, the best first, and those that fall out.

    **Raises:** `ValueError` if a name or a size is wrong, or no layout fits; the sentence says by how much.
    """
    config, name = named(model)
    objective = checked(objective, Objective, "objective")
    checked(dtype, DTypes, "dtype")
    checked(cache_dtype, CacheDType | None, "cache_dtype")
    if batch is not None:
        batch = checked(batch, Count, "batch")
    devices, chip = count_devices(topology, None), chip_of(topology)
    if objective == "train":
        if (prompt, kv_seq, cache_dtype, quantize) != (None, None, None, None):
            raise InputError(
                "A training step has float weights, no prompt and no cache; leave out prompt, kv_seq, cache_dtype and "
                "quantize."
            )
        train, length, new_tokens = train or Training(), 0, 0
        if train.seq > config.max_positions:
            raise InputError(
                f"seq is {train.seq} and the model's context is {config.max_positions} tokens; take a shorter seq."
            )
    elif train is not None:
        raise InputError("train is of training; set objective='train', or leave it out.")
    else:
        length, slots = lengths_of(config, prompt, kv_seq)
        new_tokens = max(slots - length, 1)
    task = _Task(config, chip, devices, dtype, cache_dtype, quantize, length, new_tokens)
    refused = list(_illegal(config, devices))
    # Of equal ones, that with less memory comes first.
    found = sorted(_layouts(task, objective, batch, train, refused), key=lambda one: one.memory.total)
    room = SHARE * chip.hbm_bytes
    best = [one for one in found if one.memory.total <= room]
    best.sort(key=lambda one: -one.tokens_per_second if objective == "throughput" else one.seconds)
    ranking = Ranking(
        model=name,
        place=topology,
        chip=chip,
        devices=devices,
        objective=objective,
        prompt=length,
        new_tokens=new_tokens,
        training=train,
        best=tuple(best),
        too_large=tuple(one for one in found if one.memory.total > room),
        refused=tuple(refused),
    )
    if not best:
        raise InputError(_nothing_fits(ranking))
    return ranking


def _nothing_fits(ranking: Ranking) -> str:
    if not ranking.too_large:
        label, reason = ranking.refused[0]
        return f"No layout of {ranking.model} can be on {ranking.place}. {label}: {reason}"
    least, room = ranking.too_large[0], ranking.room / 1e9
    more = "" if ranking.objective == "train" else ", a shorter kv_seq, or quantize"
    needs = least.memory.total / 1e9
    return (
        f"No layout of {ranking.model} fits {ranking.place}: the least, {least.label}, takes {needs:,.1f} GB of each "
        f"chip, {needs - room:,.1f} GB more than the {room:.1f} GB to be filled; take more chips, fewer rows{more}."
    )


def _illegal(config: MistralConfig, devices: int) -> Iterator[tuple[str, str]]:
    """The named strategies that no mesh of so many devices allows, with the reason."""
    if devices == 1:
        return
    legal = {choice.strategy.layout for choice in strategies(config, devices)}
    for name, strategy in NAMED.items():
        if any(f"{layout} ".startswith(f"{strategy.layout} ") for layout in legal):
            continue
        first, *rest = strategy.axes()
        axes = {first: devices} if not rest else {first: devices // 2, **dict.fromkeys(rest[:1], 2)}
        try:
            strategy.check(config, AbstractMesh(tuple(axes.values()), tuple(axes)))
        except InputError as error:
            yield name, str(error)


def _layouts(
    task: _Task, objective: Objective, batch: int | None, train: Training | None, refused: list[tuple[str, str]]
) -> Iterator[Estimate]:
    """The estimate of each layout; those that have none are put into `refused` with the reason."""
    if task.devices == 1:
        choices = [Choice("single", SINGLE, {"tp": 1})]
    else:
        seq = None if train is None else train.seq
        choices = [
            *strategies(task.config, task.devices, seq=seq),
            Choice("copies", SINGLE + "batch@dp", {"dp": task.devices}),
        ]
    whole = None if train is not None else whole_shapes(task.config, task.dtype, task.quantize)
    for choice in choices:
        try:
            if train is None:
                yield _request(task, choice, 1 if batch is None and objective == "latency" else batch, whole)
                continue
            stages = range(4) if choice.strategy.parts("batch seq", choice.axes) > 1 else range(1)
            for stage in stages:
                yield _step(task, choice, batch or 8, dataclasses.replace(train, zero=stage))
        except InputError as error:
            refused.append((f"{choice.strategy.name} ({show(choice.axes)})", str(error)))


def _request(task: _Task, choice: Choice, asked: int | None, whole: Any) -> Estimate:
    """The estimate of a batch of requests, by default of as many rows as the memory holds: a power of two a copy."""
    config, strategy, axes = task.config, choice.strategy, choice.axes
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    slots = slots_for(task.prompt + task.new_tokens, strategy.parts("kv_seq", axes))
    copies = strategy.parts("batch", axes)
    weights = device_bytes(split_shapes(whole, strategy, mesh))
    # A row on each copy of the model; more rows take as often as much.
    rows = cache_shapes(config, copies, slots, task.dtype, task.cache_dtype, CHUNK, strategy, mesh, "tpu")
    row = device_bytes(rows.layers)
    fitting = max(1, int((SHARE * task.chip.hbm_bytes - weights) / row))
    batch = copies * 2 ** (fitting.bit_length() - 1) if asked is None else asked
    cache = row * batch // copies
    sizes = {"batch": batch, "kv_seq": slots, "dtype": jnp.dtype(task.dtype), "cache_dtype": task.cache_dtype}
    chunk, chunks = min(task.prompt, CHUNK), math.ceil(task.prompt / CHUNK)
    # These refuse rows that cannot be split.
    prompt_exchanges = prefill(config, strategy, axes, seq=chunk, **sizes)
    token_exchanges = decoding_step(config, strategy, axes, **sizes)

    def passes(count: int, seq: int, context: float, exchanges: Iterable[Collective]) -> tuple[Roofline, float]:
        """The times of equal passes, and their seconds."""
        flops = operations(config, strategy, axes, batch=batch, seq=seq, context=context, logits=1)
        read = weights * weights_read(config, strategy, axes, tokens=batch * seq) + cache * min(context / slots, 1)
        return _times(task.chip, count, flops, read, exchanges)

    reading = passes(chunks, chunk, (task.prompt + 1) / 2, prompt_exchanges)
    writing = passes(task.new_tokens, 1, task.prompt + task.new_tokens / 2, token_exchanges)
    seconds = reading[1] + writing[1]
    tokens = batch * (task.prompt + task.new_tokens)
    return Estimate(
        choice=choice,
        batch=batch,
        zero=None,
        memory=Memory(weights, cache),
        times=_sum(reading[0], writing[0]),
        seconds=seconds,
        tokens_per_second=batch * task.new_tokens / seconds,
        utilization=2 * _active(config) * tokens / (task.devices * task.chip.flops * seconds),
    )


def _step(task: _Task, choice: Choice, batch: int, train: Training) -> Estimate:
    """The estimate of a step of training with AdamW, whose master weights and moments are float32."""
    config, strategy, axes = task.config, choice.strategy, choice.axes
    exchanges = training_step(config, strategy, axes, batch=batch, training=train, dtype=jnp.dtype(task.dtype))
    copies = strategy.parts("batch", axes)
    entries = device_entries(config, strategy, axes)
    holders = strategy.parts("batch seq", axes)
    kept, gradients, moments = (holders if train.zero >= stage else 1 for stage in (3, 2, 1))
    size = jnp.dtype(task.dtype).itemsize
    rows = batch // copies // train.accumulate
    own = rows * train.seq / strategy.parts("seq", axes)
    # Each block's input is kept, and the logits of a micro-batch with their gradient.
    stream = config.layers * own * config.embed * size / strategy.parts("tokens", axes)
    logits = 2 * own * config.vocab * 4 / strategy.parts("vocab", axes)
    memory = Memory(
        weights=int(4 * entries / kept),
        gradients=int(4 * entries / gradients),
        optimizer=0 if train.offload else int(8 * entries / moments),
        host=int(8 * entries / moments) if train.offload else 0,
        temporary=int(stream + logits + (size * entries / config.layers if train.zero == 3 else size * entries)),
    )
    forward = operations(
        config, strategy, axes, batch=batch, seq=train.seq, context=(train.seq + 1) / 2, logits=train.seq
    )
    again = 1.0 if train.remat == "block" else 0.0
    # Weights are read for each pass; the optimizer reads weights, gradients and moments and writes all but gradients.
    moved = train.accumulate * (3 + again) * size * entries + 28 * entries / moments
    times, seconds = _times(task.chip, 1, (3 + again) * forward, moved, exchanges)
    tokens = batch * train.seq
    return Estimate(
        choice=choice,
        batch=batch,
        zero=train.zero,
        memory=memory,
        times=times,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        utilization=6 * _active(config) * tokens / (task.devices * task.chip.flops * seconds),
    )


def _times(
    chip: Chip, count: int, flops: float, moved: float, exchanges: Iterable[Collective]
) -> tuple[Roofline, float]:
    """The times of `count` equal passes, and their seconds: a layer waits for its exchanges."""
    each = roofline(
        chip, flops, moved, [Exchange(one.kind, one.devices, one.count, one.count * one.bytes) for one in exchanges]
    )
    times = Roofline(count * each.compute, count * each.memory, count * each.interconnect)
    return times, max(times.compute, times.memory) + times.interconnect


def _sum(first: Roofline, second: Roofline) -> Roofline:
    return Roofline(
        first.compute + second.compute, first.memory + second.memory, first.interconnect + second.interconnect
    )


def _active(config: MistralConfig) -> int:
    """The weights that compute a token: of the experts those that it is routed to, and not the embedding."""
    chosen = 0 if config.routing is None else config.routing.per_token
    return config.matrix_entries(chosen) + config.vocab * config.embed
