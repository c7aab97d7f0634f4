"""The exchanges of a training step, in closed form: nothing is traced or compiled."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
from jax.typing import DTypeLike

from ..config import MistralConfig
from ..errors import InputError
from ..parallel import Strategy
from ..parallel.codes import NO_GRADIENT
from .communication import Collective, Ledger, Travel
from .training import Training


def training_step(
    config: MistralConfig,
    strategy: Strategy,
    axes: Mapping[str, int],
    *,
    batch: int,
    training: Training,
    dtype: DTypeLike = jnp.bfloat16,
) -> list[Collective]:
    """The exchanges of a step of [`mistral_eqx.train.make_step`][]: forward, backward, gradients and their norm.

    **Arguments:**

    - `config`, `strategy`, `axes`: as for [`mistral_eqx.planning.forward_pass`][].
    - `batch`: the number of rows, over all devices and micro-batches.
    - `training`: the length of the rows, the ZeRO stage, the number of micro-batches, and their schedule.
    - `dtype`: the precision of the forward and the backward pass. Master weights and accumulated gradients are float32.

    **Returns:** the exchanges. In the ZeRO stages 0 and 1, gradients are summed over devices once per step, in the
    stages 2 and 3 once per micro-batch. Where the strategy splits `layers`, GPipe sums them once, and 1F1B in stage 2
    in each tick.

    Experts that need tokens of other devices exchange them as in [`mistral_eqx.planning.forward_pass`][], and losses of
    routers have no weight.

    **Raises:** `ValueError` if the strategy does not fit the config or the axes, the rows cannot be split, there are
    fewer micro-batches than stages, or there is no closed form: for latent attention, shared experts or dense first
    layers, experts beside a split `seq` or `overlap`, `layers` in ZeRO 3, or a strategy that splits `embed`, `head_dim`
    beside `kv_seq` or `seq`, or `tokens` over other axes than the heads.
    """
    in_ticks, once = step_exchanges(config, strategy, axes, batch=batch, training=training, dtype=dtype)
    return [*in_ticks, *once]


def step_exchanges(
    config: MistralConfig,
    strategy: Strategy,
    axes: Mapping[str, int],
    *,
    batch: int,
    training: Training,
    dtype: DTypeLike,
) -> tuple[list[Collective], list[Collective]]:
    """The exchanges of `training_step`: those of all ticks, which are micro-batches without stages, and the others."""
    if batch % training.accumulate:
        raise InputError(
            f"A batch of {batch} cannot be split into {training.accumulate} micro-batches; take a multiple of that."
        )
    stages = strategy.parts("layers", axes)
    training.check_stages(stages)
    ledger = _TrainingLedger(config, strategy, axes, batch // training.accumulate, dtype, training)
    ledger.check()
    if training.schedule == "1f1b" and stages > 1:
        # The backward pass begins with what a stage has received, so that it repeats the forward pass.
        ledger.model(ledger.seq, ledger.kv_seq, logits=0, of_seq=training.seq)
        ledger.entries = [entry for entry in ledger.entries if entry.what not in _OF_LOSS]
    ledger.forward()
    if training.remat != "none":
        ledger.recompute()
    ledger.backward()
    ledger.each_tick(ledger.seq, training.ticks(stages), back=True)
    if config.routing is not None and stages > 1:
        # In GPipe, sums whose losses have no weight have no gradient.
        directions = 2 if training.schedule == "1f1b" else 1
        entry = directions * training.ticks(stages), 2 * config.routes + 2, 4
        ledger.write("collective_permute", "sums of routers to the next stage", 2, entry)
    in_ticks, ledger.entries = ledger.entries, []
    if training.schedule == "gpipe" and strategy.axes("layers"):
        apart = [ledger.for_all_micro_batches(entry) for entry in in_ticks if entry.what in _OF_LOSS]
        in_ticks, ledger.entries = [entry for entry in in_ticks if entry.what not in _OF_LOSS], apart
    ledger.state()
    return in_ticks, ledger.entries


# What follows the last block.
_OF_LOSS = (
    "last output",
    "largest logit",
    "sum of exponentials, target and whether it is first",
    "sums of routers",
    "tokens, and tokens of a micro-batch",
    "choices of routers",
    "gradient of the last output",
    "gradient of the last norm",
)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """All weights of one shape; those of blocks are stacked over repeats."""

    name: str
    dims: str
    arrays: int
    layers: int
    uses: int = 1


class _TrainingLedger(Ledger):
    """Lists the exchanges of a step. The gradient of a replicated array is summed over its replicas."""

    def __init__(
        self,
        config: MistralConfig,
        strategy: Strategy,
        axes: Mapping[str, int],
        batch: int,
        dtype: DTypeLike,
        training: Training,
    ):
        # Without dense layers, `hidden` is the width of an expert.
        if config.routing is not None:
            config = dataclasses.replace(config, hidden=config.expert_hidden)
        super().__init__(config, strategy, axes, batch, dtype)
        self.training, self.seq, self.kv_seq = training, self.own_tokens(training.seq), self.own_keys(training.seq)
        self.tokens, self.splits_tokens = self.rows * self.seq, self.token_shards(self.seq) > 1
        self.splits_seq = self.num_shards("seq") > 1
        # How often queries meet keys, over all layers.
        self.meetings = sum(self.rounds(training.seq)) if self.splits_seq else self.config.layers
        # The dimensions that a feed-forward layer sums over.
        self.summed = "hidden" if config.routing is None else "experts hidden"

    def check(self):
        """Refuses strategies without a closed form."""
        if self.strategy.exchange:
            raise InputError(NO_GRADIENT)
        routing = self.config.routing
        if routing is not None and (routing.shared or routing.first_dense):
            raise InputError(
                "There is no closed form of a training step of a model with shared experts or dense first layers; "
                "count the exchanges of a plan."
            )
        if routing is not None and (self.splits_seq or self.strategy.overlap):
            raise InputError(
                "There is no closed form of a training step of a model with experts whose strategy splits 'seq' or "
                "says 'overlap'; count the exchanges of a plan."
            )
        if self.config.latent is not None:
            raise InputError(
                "There is no closed form of a training step of a model with latent attention; count the exchanges of a "
                "plan."
            )
        if (travel := self.travel(self.training.seq)) is not None and travel.gathered > 1:
            raise InputError(
                "There is no closed form of a training step whose tokens are split over an axis that does not split "
                "experts, if another axis splits both; count the exchanges of a plan."
            )
        axes = self.strategy.axes
        heads = set(axes("kv_heads head_dim"))
        if (
            self.num_shards("embed") > 1
            or (axes("head_dim") and axes("kv_seq seq"))
            or not set(axes("tokens")) <= heads
            or (axes("layers") and self.training.zero == 3)
        ):
            raise InputError(
                f"There is no closed form of a training step under {self.strategy.layout!r}; take a named strategy, or "
                "count the exchanges of a plan."
            )

    def forward(self):
        """Adds the exchanges of the forward pass and of the loss."""
        self.model(self.seq, self.kv_seq, logits=0, of_seq=self.training.seq)
        self.sum("largest logit", "vocab", 1, self.tokens, self.wide)
        self.sum("sum of exponentials, target and whether it is first", "vocab", 1, 3 * self.tokens, self.wide)
        if self.config.routing is None:
            return
        if self.splits_tokens:
            self.sum("sums of routers", "tokens", 1, 2 * self.config.routes + 2, 4)
        self.sum("tokens, and tokens of a micro-batch", "batch", 2, 4)
        self.sum("choices of routers", "batch", 1, self.config.routes, 4)

    def recompute(self):
        """Adds the exchanges that rematerialisation repeats: all of a repeat of the layer pattern but its last sum."""
        seq, layers, heads = self.seq, self.config.layers, self.local("kv_heads q_per_kv")
        self.all_tokens("attention input again", layers, seq, "kv_heads head_dim")
        self.sum("attention scores again", "head_dim", self.meetings, self.tokens, heads, self.kv_seq, self.wide)
        if self.splits_seq:
            self.keys(" again", seq, self.meetings - layers)
        else:
            self.sum("softmax maximum again", "kv_seq", layers, self.tokens, heads, self.wide)
            head_dim = self.local("head_dim") + 1
            self.sum("softmax sum and values again", "kv_seq", layers, self.tokens, heads, head_dim, self.wide)
        # "dots" keeps the summed results of linear layers.
        kept = self.training.remat == "dots"
        inner = 0 if kept else layers - layers // _pattern_length(self.config)
        self.sum_tokens("attention output again", "kv_heads q_per_kv head_dim", 0 if kept else layers, seq)
        if (travel := self.travel(seq)) is not None:
            self.experts(travel, there=layers, back=inner, again=" again")
            return
        self.all_tokens("feed-forward input again", layers, seq, "hidden")
        self.sum_tokens("feed-forward output again", self.summed, inner, seq)

    def backward(self):
        """Adds the gradients of activations, and of norms if `tokens` is split."""
        layers, stream = self.config.layers, self.tokens * self.config.embed * self.narrow
        heads, head_dim = self.local("kv_heads q_per_kv"), self.local("head_dim")
        self.sum("gradient of the last output", "vocab", 1, stream)
        travel, routing, devices = self.travel(self.training.seq), self.config.routing, self.num_shards("tokens")
        for what, dims, maps in (
            ("of the feed-forward input", "hidden", 2 if routing is None else 0),
            ("of the queries' input", "kv_heads q_per_kv head_dim", 1),
            ("of the keys' and values' input", "kv_heads head_dim", 2),
        ):
            if not self.splits_tokens:
                self.sum(f"gradient {what}", dims, maps * layers, stream)
        if self.splits_tokens:
            # The gradient of an all-gather is a reduce-scatter, and the reverse; so it is with their rings.
            if self.strategy.overlap:
                self.on_ring("gradient of inputs and outputs", 4 * layers, self.seq)
                self.write("all_gather", "gradient of the embedding", devices, (1, stream // devices))
            else:
                gathers = layers if travel else 2 * layers
                self.write("reduce_scatter", "gradient of inputs", devices, (gathers, stream))
                self.write("all_gather", "gradient of outputs", devices, (gathers + 1, stream // devices))
            size = self.config.embed * self.narrow
            self.write("all_reduce", "gradient of norms", devices, (2 * layers, size))
            self.write("all_reduce", "gradient of the last norm", devices, (1, size))
            # 1F1B sends a gradient of the sums of routers too, if only of zeros: a second use of each router.
            uses = 2 if self.training.schedule == "1f1b" and self.strategy.axes("layers") else 1
            routers = 0 if routing is None else uses * layers
            self.write("all_reduce", "gradient of routers", devices, (routers, self.config.routes, size))
        if travel is not None:
            self.experts_backward(travel)
        elif routing is not None:
            gathered = self.strategy.axes("tokens") if self.splits_tokens else ()
            others = self.devices(axis for axis in self.strategy.axes(self.summed) if axis not in gathered)
            self.write("all_reduce", "gradient of the experts' input", others, (layers, stream))
            self.write("all_reduce", "gradient of shares", others, (layers, self.tokens, routing.per_token, self.wide))
        # Scores are replicated over the axes of head_dim, but values are not.
        self.sum("gradient of the softmax", "head_dim", self.meetings, self.tokens, heads, self.kv_seq, self.narrow)
        self.sum("gradient of the softmax sum", "head_dim", self.meetings, self.tokens, heads, self.wide)
        keys = self.rows * self.local("kv_heads") * head_dim * self.narrow
        self.sum("gradient of shared keys and values", "q_per_kv", 2 * self.meetings, keys, self.kv_seq)
        if not self.splits_seq:
            self.sum("gradient of queries", "kv_seq", layers, self.tokens, heads, head_dim, self.narrow)
            padded = self.kv_seq * self.num_shards("kv_seq")
            self.sum("gradient of keys and values", "kv_seq", 2 * layers, keys, padded)
        elif self.strategy.axes("kv_seq"):
            sent = 2 * (self.meetings - layers)
            self.write("collective_permute", "gradient of keys and values", 2, (sent, keys, self.seq))
        else:
            # The gradient of an all-gather is a reduce-scatter.
            count = 2 * layers, keys, self.training.seq
            self.write("reduce_scatter", "gradient of keys and values", self.num_shards("seq"), count)

    def experts_backward(self, travel: Travel):
        """Adds the gradients of tokens that travel to their experts, and of their results."""
        layers, row, note = self.config.layers, self.config.embed * self.narrow, travel.per_token * self.wide
        devices, tokens = travel.devices, travel.tokens
        if travel.slots < tokens:
            slots = devices * travel.slots
            self.write("all_to_all", "gradient of experts and shares of tokens", devices, (layers, slots, 2 * note))
            self.write("all_to_all", "gradient of tokens and of results", devices, (2 * layers, slots, row))
        else:
            self.write("all_gather", "gradient of results", devices, (layers, tokens, row))
            tokens *= devices
            self.write("reduce_scatter", "gradient of tokens", devices, (layers, tokens, row))
        self.write("all_reduce", "gradient of tokens", travel.others, (layers, tokens, row))
        self.write("all_reduce", "gradient of shares", travel.others, (layers, tokens, note))

    def for_all_micro_batches(self, entry: Collective) -> Collective:
        """An exchange of each tick, made once for all micro-batches."""
        ticks = self.training.ticks(self.num_shards("layers"))
        parts = 1 if entry.what == "gradient of the last norm" else self.training.accumulate
        return dataclasses.replace(entry, count=entry.count // ticks, bytes=entry.bytes * parts)

    def state(self):
        """Adds the exchanges of weights and their gradients, and the sums over all rows."""
        zero, micro_batches = self.training.zero, self.training.ticks(self.num_shards("layers"))
        if self.strategy.axes("layers") and self.training.schedule == "gpipe":
            # One gradient is taken through all micro-batches.
            micro_batches = 1
        sets: set[tuple[str, ...]] = set()
        for weight in self.weights():
            axes = set(self.strategy.axes(f"{weight.dims} layers" if weight.layers else weight.dims))
            # Stages have copies of what is not in a layer; an axis of the batch that splits experts has none of them.
            copies = [axis for axis in self.strategy.axes("batch seq layers") if axis not in axes]
            devices = self.devices(copies)
            sizes = [self.local(dim) for dim in weight.dims.split()]
            numbers, divisible = math.prod(sizes), any(size % devices == 0 for size in sizes)
            stacked = weight.arrays * max(weight.layers, 1)
            count, whole = weight.arrays, 4 * numbers * max(weight.layers, 1)
            name, sharded = f"of {weight.name}", zero and divisible
            sets.add(tuple(sorted(axes | set(copies if sharded else ()))))
            if zero < 2:
                self.write("all_reduce", f"gradient {name}", devices, (count, whole))
            elif zero == 2:
                kind = "reduce_scatter" if divisible else "all_reduce"
                self.write(kind, f"gradient {name}", devices, (micro_batches * count, whole))
            else:
                kind, size = "reduce_scatter" if divisible else "all_reduce", numbers * self.narrow
                self.write(kind, f"gradient {name}", devices, (micro_batches * stacked * weight.uses, size))
                gathers = 2 if weight.layers else weight.uses
                if divisible:
                    self.write("all_gather", name, devices, (micro_batches * stacked * gathers, size // devices))
            if sharded and zero < 3:
                self.write("all_gather", name, devices, (count, whole // devices))
        for axes in sorted(sets):
            self.write("all_reduce", "squares of gradients", math.prod(self.axes[axis] for axis in axes), (1, 4))
        self.sum("weight of all rows", "batch", 1, 4)
        self.sum("tokens of all rows", "batch", 0 if self.config.routing is None else 1, 4)
        self.sum("sums of the loss", "batch seq layers", 4 if self.config.routing is None else 6, 4)

    def weights(self) -> Iterator[_Weight]:
        """All trained weights."""
        pattern = _pattern_length(self.config)
        repeats = self.config.layers // pattern
        queries = "kv_heads q_per_kv head_dim embed"
        yield _Weight("queries' and output maps", queries, 2 * pattern, repeats)
        yield _Weight("keys' and values' maps", "kv_heads head_dim embed", 2 * pattern, repeats)
        yield _Weight("feed-forward maps", f"{self.summed} embed", 3 * pattern, repeats)
        if self.config.routing is not None:
            yield _Weight("routers", "routes embed", pattern, repeats)
        yield _Weight("norms", "embed", 2 * pattern, repeats)
        yield _Weight("last norm", "embed", 1, 0)
        if self.config.tied:
            yield _Weight("table", "vocab embed", 1, 0, uses=2)
        else:
            yield _Weight("table and head", "vocab embed", 2, 0)


def _pattern_length(config: MistralConfig) -> int:
    """The number of layers of the layer pattern, which is that of the windows."""
    windows, layers = config.windows, config.layers
    return next(
        size for size in range(1, layers + 1) if layers % size == 0 and windows == windows[:size] * (layers // size)
    )
