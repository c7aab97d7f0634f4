"""All layouts of a model on some chips, ranked by estimates in closed form: nothing is compiled."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from ..checks import CacheDType, Count, checked
from ..config import MistralConfig
from ..errors import InputError
from ..generation.reading import CHUNK
from ..nn.cross_entropy import chunk_rows, keeps_logits
from ..nn.slots import slots_for
from ..parallel import NAMED, SINGLE, Choice, Strategy, strategies
from ..parallel.mesh import show
from ..quant import Recipe
from .arguments import DTypes, chip_of, count_devices, lengths_of, named
from .chips import Chip
from .communication import Collective, decoding_step, prefill
from .exposure import exposed
from .fitting import SHARE
from .limits import exchange_seconds
from .report import Exchange, Memory, Roofline
from .shapes import cache_shapes, device_bytes, split_shapes, whole_shapes
from .training import Training
from .training_communication import step_exchanges
from .work import device_entries, operations, weights_read


Objective = Literal["latency", "throughput", "train"]
# The schedules of a pipeline, and their names in a table.
SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B"}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A layout, and what it takes by an estimate; all of one device.

    **Attributes:**

    - `choice`: the strategy and its mesh.
    - `batch`: the number of rows, over all devices.
    - `training`: in training, its options with the stage of ZeRO, the number of micro-batches and the schedule of this
        layout; `None` for generation.
    - `memory`: the bytes. Of temporary arrays, training counts the activations that blocks or stages keep and the
        logits that exist at once, and generation none.
    - `times`: the seconds for compute, memory and links, of a whole request or of a step of training, and in a pipeline
        the bubble.
    - `seconds`: the least time of a whole request of the batch, or of a step. The longer of compute and memory in each
        pass, the exchanges, which a layer waits for unless they overlap with its products, and the bubble.
    - `tokens_per_second`: new tokens, or tokens of training, of all devices.
    - `utilization`: the share of the peak operations of all devices that the weights take; in training that is the
        MFU, without the passes that are computed again.
    """

    choice: Choice
    batch: int
    training: Training | None
    memory: Memory
    times: Roofline
    seconds: float
    tokens_per_second: float
    utilization: float

    @property
    def zero(self) -> int | None:
        """In training, the stage of ZeRO."""
        return None if self.training is None else self.training.zero

    @property
    def label(self) -> str:
        """The strategy, its mesh and how it trains, as text."""
        words, training = [show(self.choice.axes)], self.training
        if training is not None:
            words += [f"ZeRO {training.zero}"]
            words += [f"{training.accumulate} micro-batches"] if training.accumulate > 1 else []
            words += [SCHEDULES[training.schedule]] if self.choice.strategy.axes("layers") else []
        return f"{self.choice.strategy.name} ({', '.join(words)})"

    @property
    def options(self) -> str:
        """The options of `mistral-eqx plan` that choose this layout."""
        words, training = [f"--strategy '{self.choice.strategy.name}' --mesh {show(self.choice.axes)}"], self.training
        if training is not None:
            words += [f"--zero {training.zero}"] if training.zero else []
            words += [f"--accumulate {training.accumulate}"] if training.accumulate > 1 else []
            words += [f"--schedule {training.schedule}"] if self.choice.strategy.axes("layers") else []
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """The fields as dicts and numbers."""
        fields = {**dataclasses.asdict(self), "bound": self.times.bound, "options": self.options, "zero": self.zero}
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

    The layouts are those of [`mistral_eqx.strategies`][], copies of the whole model and, where tokens are split,
    [overlapped exchanges](overlap.md). Training adds [pipelines](pipelines.md) in both schedules, each stage of ZeRO,
    and the number of micro-batches: the fewest that fit, and for a pipeline the fastest. The times are those at the
    chip's peaks, as in a [roofline](plan.md#the-roofline), so compare them with each other. [`mistral_eqx.plan`][]
    compiles one.

    **Arguments:**

    - `model`, `topology`, `prompt`, `kv_seq`, `dtype`, `cache_dtype`, `quantize`: as for [`mistral_eqx.plan`][]. A
        topology of GPUs is their name and their number, such as `"H100:8"`. A request reads the prompt, and writes new
        tokens until it fills `kv_seq`.
    - `objective`: `"latency"`, the time of a batch of requests; `"throughput"`, new tokens per second; or `"train"`,
        the time of a step.
    - `batch`: the rows over all devices. Unless given, 1 for the latency, 8 in training, and for the throughput as
        many rows as each layout has memory for, a power of two.
    - `train`: for `"train"`, the length of rows, what is kept for the backward pass, and a divisor of the number of
        micro-batches. Its stage of ZeRO and its schedule have no effect.

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
    refused = list(_illegal(config, devices, stages=train is not None))
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


def _illegal(config: MistralConfig, devices: int, *, stages: bool) -> Iterator[tuple[str, str]]:
    """The named strategies, and with `stages` pipelines, that no mesh of so many devices allows, with the reason."""
    if devices == 1:
        return
    found = strategies(config, devices, micro_batches=devices if stages else None)
    legal = {choice.strategy.layout for choice in found}
    pipelines = {"layers@pp": Strategy("layers@pp")} if stages and not any("layers@" in one for one in legal) else {}
    for name, strategy in {**NAMED, **pipelines}.items():
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
        more = {} if train is None else {"seq": train.seq, "micro_batches": batch or 8}
        named = strategies(task.config, task.devices, **more)
        choices = [*named, Choice("copies", SINGLE + "batch@dp", {"dp": task.devices})]
        choices += [
            Choice(f"{one.name}, {word}", one.strategy + word, one.axes)
            for one in named
            if one.strategy.axes("tokens")
            # Both directions are faster, unless a switch gives one of them all that a device can send.
            for word in ("overlap",) + ("overlap=1",) * (task.chip.switched is not None)
        ]
    whole = None if train is not None else whole_shapes(task.config, task.dtype, task.quantize)
    for choice in choices:
        try:
            if train is None:
                yield _request(task, choice, 1 if batch is None and objective == "latency" else batch, whole)
                continue
            staged = bool(choice.strategy.axes("layers"))
            sharded = choice.strategy.parts("batch seq layers", choice.axes) > 1
            # Stage 3 would gather the weights of a layer in each tick, and has no closed form.
            for zero in range(4 - staged) if sharded else range(1):
                for schedule in SCHEDULES if staged else ("gpipe",):
                    options = dataclasses.replace(train, zero=zero, schedule=schedule)
                    yield _fastest_step(task, choice, batch or 8, options)
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
    waits = _waits(task, choice, batch, chunk)

    def passes(count: int, seq: int, context: float, exchanges: Iterable[Collective]) -> tuple[Roofline, float]:
        """The times of equal passes, and their seconds."""
        flops = operations(config, strategy, axes, batch=batch, seq=seq, context=context, logits=1)
        read = weights * weights_read(config, strategy, axes, tokens=batch * seq) + cache * min(context / slots, 1)
        return _times(task.chip, count, flops, read, _exchanged(task.chip, exchanges, waits))

    reading = passes(chunks, chunk, (task.prompt + 1) / 2, prompt_exchanges)
    writing = passes(task.new_tokens, 1, task.prompt + task.new_tokens / 2, token_exchanges)
    seconds = reading[1] + writing[1]
    tokens = batch * (task.prompt + task.new_tokens)
    return Estimate(
        choice=choice,
        batch=batch,
        training=None,
        memory=Memory(weights, cache),
        times=_sum(reading[0], writing[0]),
        seconds=seconds,
        tokens_per_second=batch * task.new_tokens / seconds,
        utilization=2 * _active(config) * tokens / (task.devices * task.chip.flops * seconds),
    )


def _fastest_step(task: _Task, choice: Choice, batch: int, train: Training) -> Estimate:
    """The estimate of a step with the best number of micro-batches.

    Without stages the fewest that fit, because each one reads the weights again. Stages wait less with more
    micro-batches, which then take less memory too; so the search begins with the most.
    """
    strategy, axes = choice.strategy, choice.axes
    strategy.check_micro_batches(batch, train.accumulate, axes)
    stages, rows = strategy.parts("layers", axes), batch // strategy.parts("batch", axes)
    dataclasses.replace(train, accumulate=rows).check_stages(stages)
    counts = [count for count in _divisors(rows) if count >= stages and count % train.accumulate == 0]

    def step(count: int) -> Estimate:
        return _step(task, choice, batch, with_count(count))

    def with_count(count: int) -> Training:
        return dataclasses.replace(train, accumulate=count)

    def fits(count: int) -> bool:
        return _step_memory(task, choice, batch, with_count(count)).total <= SHARE * task.chip.hbm_bytes

    if stages == 1:
        return step(next((count for count in counts if fits(count)), rows))
    best = step(rows)
    for count in reversed(counts[:-1]):
        if not fits(count) or (one := step(count)).seconds >= best.seconds:
            break
        best = one
    return best


@functools.cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(divisor for divisor in range(1, number + 1) if number % divisor == 0)


def _step_memory(task: _Task, choice: Choice, batch: int, train: Training) -> Memory:
    """The memory of a step of training with AdamW, whose master weights and moments are float32."""
    config, strategy, axes = task.config, choice.strategy, choice.axes
    size, stages = jnp.dtype(task.dtype).itemsize, strategy.parts("layers", axes)
    entries = device_entries(config, strategy, axes)
    shards = device_entries(config, strategy, axes, over="batch seq layers")
    kept, gradients, moments = (shards if train.zero >= stage else entries for stage in (3, 2, 1))
    tokens = batch // strategy.parts("batch", axes) / train.accumulate * train.seq / strategy.parts("seq", axes)
    # The residual stream of a micro-batch. Blocks keep their inputs, and GPipe those of all ticks and what follows the
    # last block; 1F1B keeps what stages have received.
    stream = tokens * config.embed * size / strategy.parts("tokens", axes)
    layers = config.layers / stages
    if stages == 1:
        stream *= layers
    elif train.schedule == "1f1b":
        stream *= layers + 2 * stages - 1
    else:
        stream *= (layers + 1) * train.ticks(stages)
    # The logits that exist at once, the gradient of a chunk of them, and the weights in the precision of activations.
    rows, scored = _logits(choice, config, batch, train)
    chunk = chunk_rows(rows, scored)
    logits = 4 * scored * (chunk + (rows if keeps_logits(rows, scored) else chunk))
    narrow = size * entries / (layers if train.zero == 3 else 1)
    return Memory(
        weights=int(4 * kept),
        gradients=int(4 * gradients),
        optimizer=0 if train.offload else int(8 * moments),
        host=int(8 * moments) if train.offload else 0,
        temporary=int(stream + logits + narrow),
    )


def _logits(choice: Choice, config: MistralConfig, batch: int, train: Training) -> tuple[int, int]:
    """The rows of the head on a device, and the tokens for which it computes them at once in a step of training."""
    strategy, axes = choice.strategy, choice.axes
    tokens = batch // strategy.parts("batch", axes) * train.seq // strategy.parts("seq", axes)
    # GPipe computes the head for all micro-batches at once, and otherwise it is computed for each of them.
    apart = strategy.parts("layers", axes) > 1 and train.schedule != "1f1b"
    return config.vocab // strategy.parts("vocab", axes), tokens if apart else tokens // train.accumulate


def _step(task: _Task, choice: Choice, batch: int, train: Training) -> Estimate:
    """The estimate of a step of training."""
    config, strategy, axes = task.config, choice.strategy, choice.axes
    size, stages = jnp.dtype(task.dtype).itemsize, strategy.parts("layers", axes)
    count, ticks = train.accumulate, train.ticks(stages)
    one_by_one = stages > 1 and train.schedule == "1f1b"
    apart = stages > 1 and not one_by_one
    in_ticks, once = step_exchanges(config, strategy, axes, batch=batch, training=train, dtype=jnp.dtype(task.dtype))
    entries = device_entries(config, strategy, axes)
    blocks = device_entries(config, strategy, axes, blocks=True)
    moments = device_entries(config, strategy, axes, over="batch seq layers") if train.zero else entries
    sizes = {"batch": batch, "seq": train.seq, "context": (train.seq + 1) / 2}
    of_blocks = operations(config, strategy, axes, logits=0, **sizes) / count
    of_head = operations(config, strategy, axes, logits=train.seq, **sizes) / count - of_blocks
    again = 1.0 if train.remat == "block" else 0.0
    # 1F1B computes a stage forward once more.
    passes = 3 + again + one_by_one
    of_logits = 3 if keeps_logits(*_logits(choice, config, batch, train)) else 4
    head = of_logits * of_head, of_logits * size * (entries - blocks)
    inside, outside = ((0.0, 0.0), (count * head[0], head[1])) if apart else (head, (0.0, 0.0))
    waits = _waits(task, choice, batch // count, train.seq, training=True)
    links = _exchanged(task.chip, in_ticks, waits) / ticks
    tick, tick_seconds = _times(task.chip, 1, passes * of_blocks + inside[0], passes * size * blocks + inside[1], links)
    # The optimizer reads weights, gradients and moments and writes all but gradients.
    moved, links = 28 * moments + outside[1], _exchanged(task.chip, once, waits)
    rest, rest_seconds = _times(task.chip, 1, outside[0], moved, links)
    work = _sum(_scaled(tick, count), rest)
    times = dataclasses.replace(work, bubble=(ticks - count) * tick_seconds)
    seconds, tokens = ticks * tick_seconds + rest_seconds, batch * train.seq
    return Estimate(
        choice=choice,
        batch=batch,
        training=train,
        memory=_step_memory(task, choice, batch, train),
        times=times,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        utilization=6 * _active(config) * tokens / (task.devices * task.chip.flops * seconds),
    )


def _waits(task: _Task, choice: Choice, batch: int, seq: int, *, training: bool = False) -> dict[str, float]:
    """How long products wait for each exchange that travels on a ring beside them."""
    if not choice.strategy.overlap:
        return {}
    arguments = task.config, choice.strategy, choice.axes, task.chip
    sizes = {"batch": batch, "seq": seq, "dtype": jnp.dtype(task.dtype)}
    waits = {one.what: one.wait for one in exposed(*arguments, **sizes)}
    if training:
        back = [one.wait for one in exposed(*arguments, **sizes, backward=True)]
        waits |= {f"{what} again": wait for what, wait in waits.items()}
        waits["gradient of inputs and outputs"] = sum(back) / len(back)
    hops = choice.strategy.parts("tokens", choice.axes) - 1
    return {what: wait / hops for what, wait in waits.items()}


def _exchanged(chip: Chip, exchanges: Iterable[Collective], waits: Mapping[str, float]) -> float:
    """The seconds of exchanges; of those on a ring beside products, the seconds that these wait."""
    total = 0.0
    for one in exchanges:
        if one.kind == "collective_permute" and one.what in waits:
            total += one.count * waits[one.what]
        else:
            total += exchange_seconds(chip, Exchange(one.kind, one.devices, one.count, one.count * one.bytes))
    return total


def _times(chip: Chip, count: int, flops: float, moved: float, links: float) -> tuple[Roofline, float]:
    """The times of `count` equal passes, and their seconds: a layer waits for its exchanges."""
    each = Roofline(flops / chip.flops, moved / chip.hbm_bandwidth, links)
    return _scaled(each, count), count * (max(each.compute, each.memory) + each.interconnect)


def _scaled(times: Roofline, count: int) -> Roofline:
    return Roofline(count * times.compute, count * times.memory, count * times.interconnect)


def _sum(first: Roofline, second: Roofline) -> Roofline:
    return Roofline(
        first.compute + second.compute, first.memory + second.memory, first.interconnect + second.interconnect
    )


def _active(config: MistralConfig) -> int:
    """The weights that compute a token: of the experts those that it is routed to, and not the embedding."""
    chosen = 0 if config.routing is None else config.routing.per_token
    return config.matrix_entries(chosen) + config.vocab * config.embed
