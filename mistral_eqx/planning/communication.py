"""The exchanges of a forward pass or a decoding step, in closed form: nothing is traced or compiled."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from ..checks import CacheDType
from ..config import MistralConfig
from ..errors import InputError
from ..generation import Sampler
from ..nn.expert_exchange import exchange_slots, travel_axes
from ..nn.ring import ring_hops
from ..parallel import Strategy
from ..parallel.codes import are_coded, block_size, code_bytes


# With a split vocabulary, top-p searches its threshold in this many rounds, each with this many candidates.
_NUCLEUS_ROUNDS, _NUCLEUS_CANDIDATES = 6, 31


CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute"]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One or more equal exchanges.

    **Attributes:**

    - `kind`: the operation.
    - `what`: the name of the exchanged array, such as `"attention output"`.
    - `count`: the number of exchanges, over all layers.
    - `bytes`: the input size of one device in one exchange, as in StableHLO. The output of an `all_reduce` has the same
        size, that of an `all_gather` is `devices` times larger, that of a `reduce_scatter` `devices` times smaller. The
        bytes on the links depend on the algorithm; a ring moves `2 * (devices - 1) / devices` of `bytes` for an
        `all_reduce`, `devices - 1` times `bytes` for an `all_gather`, `(devices - 1) / devices` for a `reduce_scatter`.
        An `all_to_all` keeps the size, and a device sends `(devices - 1) / devices` of it. In a `collective_permute`, a
        device sends `bytes` to one other device; `devices` is 2.
    - `devices`: the number of devices in a group. The other devices of the mesh form groups that make the same exchange
        at the same time.
    """

    kind: CollectiveKind
    what: str
    count: int
    bytes: int
    devices: int


def forward_pass(
    config: MistralConfig,
    strategy: Strategy,
    axes: Mapping[str, int],
    *,
    batch: int,
    seq: int,
    dtype: DTypeLike = jnp.bfloat16,
    micro_batches: int = 1,
) -> list[Collective]:
    """The exchanges of `model(ids)`.

    **Arguments:**

    - `config`: the config of the model.
    - `strategy`: the strategy.
    - `axes`: the size of each mesh axis.
    - `batch`, `seq`: the global shape of `ids`.
    - `dtype`: the precision of the model. Sums in the softmax, in norms and of logits are computed and exchanged in
        float32 at least.
    - `micro_batches`: into how many parts `model(ids, micro_batches=...)` cuts the rows, where the strategy splits
        `layers`.

    **Returns:** the exchanges, in order; equal exchanges of several layers are one entry. Groups of one device have no
    entries.

    **Raises:** `ValueError` if the strategy does not fit the config or the axes, as in `Strategy.check`, or `batch`
    or `seq` cannot be split.
    """
    ledger = Ledger(config, strategy, axes, batch, dtype)
    strategy.check_micro_batches(batch, micro_batches, axes)
    own = ledger.own_tokens(seq)
    parts = micro_batches if strategy.axes("layers") else 1
    ledger.model(own, ledger.own_keys(seq), logits=own, of_seq=seq, in_order=True, micro_batches=parts)
    ledger.sum("last output of the last stage", "layers", 1, ledger.rows, own, ledger.local("embed"), ledger.narrow)
    return ledger.entries


def prefill(
    config: MistralConfig,
    strategy: Strategy,
    axes: Mapping[str, int],
    *,
    batch: int,
    seq: int,
    kv_seq: int,
    dtype: DTypeLike = jnp.bfloat16,
    cache_dtype: CacheDType | None = None,
    parts: int = 1,
) -> list[Collective]:
    """The exchanges of a prefill of `seq` tokens into a cache, with logits of the last token alone.

    Devices share the tokens as in [`mistral_eqx.nn.Mistral.prefill`][], with full caches.

    **Arguments:** those of [`mistral_eqx.planning.forward_pass`][], and

    - `kv_seq`: the slots of the cache, over all devices.
    - `cache_dtype`: the codes of the cache, as in [`mistral_eqx.generate`][].
    - `parts`: as in `Mistral.prefill`.

    **Raises:** `ValueError` as for `forward_pass`, and if `kv_seq` cannot be split.
    """
    ledger = Ledger(config, strategy, axes, batch, dtype)
    slots, devices = ledger.shard_size("kv_seq", kv_seq), ledger.num_shards("seq")
    if strategy.axes("seq") == strategy.axes("kv_seq") and devices > 1 and seq % (2 * devices) == 0:
        ledger.model(seq // devices, slots, logits=1, cache_dtype=cache_dtype, of_seq=seq, cached=True)
    else:
        ledger.with_cache(seq, slots, parts, cache_dtype=cache_dtype)
    return ledger.entries


def decoding_step(
    config: MistralConfig,
    strategy: Strategy,
    axes: Mapping[str, int],
    *,
    batch: int,
    kv_seq: int,
    dtype: DTypeLike = jnp.bfloat16,
    cache_dtype: CacheDType | None = None,
    sampler: Sampler | None = None,
) -> list[Collective]:
    """The exchanges of one decoding step: the forward pass of one token per row, and the choice of the next token.

    **Arguments:** those of [`mistral_eqx.planning.prefill`][], and

    - `sampler`: the sampler; greedy unless given.
    """
    ledger = Ledger(config, strategy, axes, batch, dtype)
    ledger.with_cache(1, ledger.shard_size("kv_seq", kv_seq), cache_dtype=cache_dtype)
    ledger.choice(sampler or Sampler())
    return ledger.entries


@dataclasses.dataclass(frozen=True)
class Travel:
    """How tokens meet the experts of other devices.

    **Attributes:**

    - `devices`: those among which tokens travel; `gathered`: those whose tokens are gathered before; `others`: those
        that add up their sums afterwards; `everywhere`: those with different choices.
    - `tokens`: the tokens of a device; `slots`: those that it can send to another one, all if they are gathered.
    """

    devices: int
    gathered: int
    others: int
    everywhere: int
    tokens: int
    slots: int
    per_token: int


@functools.lru_cache(maxsize=64)
def _of_stage(config: MistralConfig, stages: int) -> MistralConfig:
    """The config of the layers of one stage: all stages are equal. A new config is checked, which takes long."""
    if stages == 1:
        return config
    layers = config.layers // stages
    return dataclasses.replace(config, layers=layers, windows=config.windows[:layers])


class Ledger:
    """Lists exchanges in the order in which the modules of `nn` make them."""

    def __init__(
        self, config: MistralConfig, strategy: Strategy, axes: Mapping[str, int], batch: int, dtype: DTypeLike
    ):
        strategy.check(config, AbstractMesh(tuple(axes.values()), tuple(axes)))
        self.config, self.strategy, self.axes = _of_stage(config, strategy.parts("layers", axes)), strategy, axes
        self.rows = self.shard_size("batch", batch)
        self.narrow = jnp.dtype(dtype).itemsize
        self.wide = max(self.narrow, 4)
        self.entries: list[Collective] = []

    def num_shards(self, dims: str) -> int:
        """The number of shards of `dims` together."""
        return self.strategy.parts(dims, self.axes)

    def shard_size(self, dim: str, size: int) -> int:
        """The local size of a dimension whose global size is an argument."""
        if size % self.num_shards(dim):
            raise InputError(
                f"A {dim} of {size} cannot be split over {self.num_shards(dim)} devices; take a multiple of that."
            )
        return size // self.num_shards(dim)

    def own_tokens(self, seq: int) -> int:
        """The tokens that one device computes in a pass without a cache."""
        self.strategy.check_length(seq, self.axes)
        return seq // self.num_shards("seq")

    def own_keys(self, seq: int) -> int:
        """The keys that queries meet at once in a pass without a cache."""
        return -(-seq // self.num_shards("kv_seq"))

    def rounds(self, seq: int) -> list[int]:
        """For each layer, the number of devices on the ring whose keys a device meets, itself included."""
        devices, windows = self.num_shards("seq"), self.config.windows
        if not self.strategy.axes("kv_seq"):
            return [1] * len(windows)
        return [len(ring_hops(window, seq, devices)) for window in windows]

    def local(self, dims: str) -> int:
        """The number of entries of one device along `dims` of the config."""
        return math.prod(getattr(self.config, dim) // self.num_shards(dim) for dim in dims.split())

    @property
    def value_dim(self) -> int:
        """The entries of a value on one device, which has as many shards as a key has."""
        return self.config.value_dim // self.num_shards("head_dim")

    def write(self, kind: CollectiveKind, what: str, devices: int, entry: tuple):
        count, *sizes = entry
        if devices > 1 and count:
            self.entries.append(Collective(kind, what, count, math.prod(sizes), devices))

    def sum(self, what: str, dims: str, *entry: int):
        """Adds an `all_reduce` over the shards of `dims`; `entry` is the count, and factors of the bytes."""
        self.write("all_reduce", what, self.num_shards(dims), entry)

    def token_shards(self, seq: int) -> int:
        """The number of shards of the residual stream along `tokens`."""
        return self.num_shards("tokens") if seq % self.num_shards("tokens") == 0 else 1

    def sum_tokens(self, what: str, dims: str, count: int, seq: int, *, of_linear: bool = True):
        """Adds the sums into the residual stream, of which each device receives its own tokens."""
        devices, embed = self.token_shards(seq), self.local("embed")
        rings = of_linear and self.strategy.overlap and devices > 1
        self.all_reduce(what, self.num_shards(dims) // devices, count, seq // devices if rings else seq, embed)
        if rings:
            self.on_ring(what, count, seq)
        else:
            self.reduce_scatter(what, devices, count, seq, embed)

    def all_tokens(self, what: str, count: int, seq: int, out_dims: str = "", *, coded: bool = True):
        """Adds the all-gathers of the tokens of the residual stream, for products with these resulting dimensions."""
        devices = self.token_shards(seq)
        if self.strategy.overlap and {*self.strategy.axes("tokens")} <= {*self.strategy.axes(out_dims)}:
            self.on_ring(what, count, seq)
            return
        self.all_gather(what, devices, count, seq, self.local("embed"), coded=coded)

    def all_reduce(self, what: str, devices: int, count: int, seq: int, numbers: int):
        """Adds sums of the `numbers` of each of `seq` tokens in a row, on all devices."""
        if devices < 2 or not are_coded(self.strategy, seq):
            self.write("all_reduce", what, devices, (count, self.rows * seq, numbers, self.narrow))
            return
        share = code_bytes(-(-self.blocks(seq, numbers) // devices), numbers)
        self.write("all_to_all", what, devices, (count, devices, share))
        self.write("all_gather", what, devices, (count, share))

    def reduce_scatter(self, what: str, devices: int, count: int, seq: int, numbers: int):
        """Adds the same sums, of which each device receives those of its tokens."""
        if are_coded(self.strategy, seq):
            self.write("all_to_all", what, devices, (count, code_bytes(self.blocks(seq, numbers), numbers)))
        else:
            self.write("reduce_scatter", what, devices, (count, self.rows * seq, numbers, self.narrow))

    def all_gather(self, what: str, devices: int, count: int, seq: int, numbers: int, *, coded: bool = True):
        """Adds the gathering of the `numbers` of each of `seq` tokens in a row; with `coded`, as codes if sums are."""
        own = seq // devices
        if coded and are_coded(self.strategy, seq):
            self.write("all_gather", what, devices, (count, code_bytes(self.blocks(own, numbers), numbers)))
        else:
            self.write("all_gather", what, devices, (count, self.rows * own, numbers, self.narrow))

    def blocks(self, seq: int, numbers: int) -> int:
        """The blocks of codes of `seq` tokens in a row."""
        return self.rows * seq * (numbers // block_size(numbers))

    def on_ring(self, what: str, count: int, seq: int):
        """Adds the exchanges of tokens or of their sums that travel along a ring beside products."""
        devices = self.token_shards(seq)
        size = self.rows * (seq // devices) * self.local("embed") * self.narrow
        self.write("collective_permute", what, 2, (count * (devices - 1), size))

    def model(
        self,
        seq: int,
        kv_seq: int,
        *,
        logits: int,
        cache_dtype: CacheDType | None = None,
        of_seq: int | None = None,
        in_order: bool = False,
        cached: bool = False,
        micro_batches: int | None = None,
        parts: int | None = None,
    ):
        """Adds the exchanges of the model, for `seq` tokens that attend to `kv_seq` keys on each device.

        **Arguments:**

        - `logits`: the number of tokens whose logits are computed.
        - `of_seq`: the number of tokens of all devices; without it, no device has a share of the tokens.
        - `in_order`: whether devices that split `seq` exchange the last activations to have them in order.
        - `cached`: whether devices that split `seq` have caches, all of whose slots travel with their indices.
        - `micro_batches`: the number of parts of the rows that pass through stages; `None` adds the exchanges of one.
        - `parts`: the number of parts of a sequence that pass through stages, of `seq` tokens each.
        """
        all_rows, self.rows = self.rows, self.rows // (micro_batches or 1)
        split = of_seq is not None and self.num_shards("seq") > 1
        rounds = sum(self.rounds(of_seq)) if split and of_seq is not None else self.config.layers
        if cached:
            rounds = self.num_shards("seq") * self.config.layers
        layers, tokens, heads = self.config.layers, self.rows * seq, self.local("kv_heads q_per_kv")
        self.sum_tokens("embedding", "vocab", 1, seq, of_linear=False)

        self.sum("attention norm", "embed", layers, tokens, self.wide)
        self.all_tokens("attention input", layers, seq, "" if self.config.latent is not None else "kv_heads head_dim")
        shards = self.num_shards("embed")
        self.all_reduce("queries", shards, layers, seq, self.local("kv_heads q_per_kv head_dim"))
        self.all_reduce("keys and values", shards, 2 * layers, seq, self.local("kv_heads head_dim"))
        if cache_dtype is not None:
            own = self.rows * -(-(of_seq or seq) // self.num_shards("kv_seq"))
            self.sum("cache scales", "head_dim", 2 * layers, own, self.local("kv_heads"), 4)
        if split:
            self.keys("", kv_seq if cached else seq, rounds - layers)
        if cached:
            self.write("collective_permute", "mask indices of keys", 2, (rounds - layers, self.rows, kv_seq, 4))
        self.sum("attention scores", "head_dim", rounds, tokens, heads, kv_seq, self.wide)
        if not split:
            self.sum("softmax maximum", "kv_seq", layers, tokens, heads, self.wide)
            self.sum("softmax sum and values", "kv_seq", layers, tokens, heads, self.value_dim + 1, self.wide)
        self.sum_tokens("attention output", "kv_heads q_per_kv head_dim", layers, seq)

        self.sum("feed-forward norm", "embed", layers, tokens, self.wide)
        self.feed_forward(seq)
        if passing := micro_batches or parts:
            self.each_tick(seq, passing + self.num_shards("layers") - 1)

        self.rows = all_rows
        self.sum("last norm", "embed", 1, self.rows, seq, self.wide)
        self.all_tokens("last output", 1, seq)
        if split and in_order:
            half = self.rows * (seq // 2) * self.local("embed") * self.narrow
            self.write("collective_permute", "last output in order", 2, (2, half))
        if cached:
            self.sum("last token", "seq", 1, self.rows, self.local("embed"), self.narrow)
        self.sum("logits", "embed", 1, self.rows * logits, self.local("vocab"), self.wide)

    def with_cache(self, seq: int, slots: int, parts: int = 1, *, cache_dtype: CacheDType | None):
        """Adds the exchanges of a pass with a cache, whose logits are those of the last token.

        **Arguments:**

        - `seq`: the tokens of each row, in so many `parts`.
        - `slots`: those of this device.
        """
        seq //= parts
        self.model(seq, slots, logits=1, cache_dtype=cache_dtype, parts=parts)
        stream = self.rows * (seq // self.token_shards(seq)) * self.local("embed") * self.narrow
        self.sum("last output of the last stage", "layers", 1, stream)

    def each_tick(self, seq: int, ticks: int, *, back: bool = False):
        """Counts all exchanges so far once for each tick of a pipeline, and adds those between stages.

        **Arguments:**

        - `ticks`: the number of ticks of a pass.
        - `back`: whether gradients are sent back too.
        """
        self.entries = [dataclasses.replace(entry, count=entry.count * ticks) for entry in self.entries]
        if self.num_shards("layers") > 1:
            size = self.rows * (seq // self.token_shards(seq)) * self.local("embed") * self.narrow
            self.write("collective_permute", "activations to the next stage", 2, (ticks, size))
            if back:
                self.write("collective_permute", "gradients to the stage before", 2, (ticks, size))

    def keys(self, when: str, seq: int, sent: int):
        """Adds the exchanges of the keys and values of devices that split `seq`.

        **Arguments:**

        - `when`: the end of their name.
        - `seq`: the keys of one device.
        - `sent`: how often keys are sent on along the ring, over all layers.
        """
        latent, arrays, numbers = self.config.latent, 2, self.local("kv_heads head_dim")
        if latent is not None:
            arrays, numbers = 1, latent.cached
        size = self.rows * seq * numbers * self.narrow
        if self.strategy.axes("kv_seq"):
            self.write("collective_permute", f"keys and values on the ring{when}", 2, (arrays * sent, size))
        else:
            devices, count = self.num_shards("seq"), arrays * self.config.layers
            self.write("all_gather", f"keys and values of all devices{when}", devices, (count, size))

    def feed_forward(self, seq: int):
        """Adds the exchanges of the feed-forward layers without their norms."""
        dense, routing, travel = self.config.dense_layers, self.config.routing, self.travel(seq)
        layers = self.config.layers - dense
        whole = self.config.layers if travel is None else dense
        self.all_tokens("feed-forward input", dense, seq, "hidden")
        # The tokens of routed experts travel as they are.
        self.all_tokens("feed-forward input", whole - dense, seq, coded=routing is None or routing.shared > 0)
        self.all_reduce("gate and up", self.num_shards("embed"), 2 * whole, seq, self.local("hidden"))
        self.sum_tokens("feed-forward output", "hidden", dense, seq)
        if routing is not None and routing.shared:
            self.sum_tokens("shared experts' output", "hidden", layers, seq)
        if travel is not None:
            self.experts(travel, there=layers, back=layers)
        else:
            self.sum_tokens("experts' output", "experts hidden", layers, seq, of_linear=False)

    def travel(self, seq: int) -> Travel | None:
        """How tokens meet the experts of other devices; `None` if they need not, or there are no experts."""
        routing, split = self.config.routing, self.token_shards(seq) > 1
        axes = travel_axes(self.strategy, tokens_split=split)
        if routing is None or (devices := self.devices(axes)) == 1:
            return None
        gathered = self.devices(axis for axis in self.strategy.axes("tokens") if split and axis not in axes)
        tokens = self.rows * seq // self.token_shards(seq) * gathered
        slots = exchange_slots(tokens, routing.per_token, self.config.experts, self.local("experts"))
        others = self.devices(axis for axis in self.strategy.axes("experts hidden") if axis not in axes)
        everywhere = self.devices(self.strategy.axes("experts batch layers" + " tokens" * split))
        return Travel(devices, gathered, others // gathered, everywhere, tokens, slots, routing.per_token)

    def experts(self, travel: Travel, *, there: int, back: int, again: str = ""):
        """Adds the exchanges of `there` layers whose tokens meet experts, and `back` whose results return."""
        devices, tokens, row = travel.devices, travel.tokens, self.config.embed * self.narrow
        own = tokens // travel.gathered
        self.write("all_gather", f"feed-forward input{again}", travel.gathered, (there, own, row))
        if travel.slots < tokens:
            note = 2 * travel.per_token, self.wide
            entry = there, 4
            self.write("all_reduce", f"most tokens from one device to another{again}", travel.everywhere, entry)
            entry = there, devices, travel.slots, *note
            self.write("all_to_all", f"experts and shares of tokens{again}", devices, entry)
            entry = there + back, devices, travel.slots, row
            self.write("all_to_all", f"tokens to experts and back{again}", devices, entry)
        else:
            self.write("all_gather", f"tokens of all devices{again}", devices, (there, tokens, row))
            self.write("reduce_scatter", f"sums for all tokens{again}", devices, (back, devices, tokens, row))
        seq = tokens // self.rows
        self.all_reduce(f"experts' output{again}", travel.others, back, seq, self.config.embed)
        self.reduce_scatter(f"experts' output{again}", travel.gathered, back, seq, self.config.embed)

    def devices(self, axes: Iterable[str]) -> int:
        """The number of devices along mesh axes."""
        return math.prod(self.axes[axis] for axis in axes)

    def choice(self, sampler: Sampler):
        """Adds the exchanges of the choice of the next token."""
        if not sampler.greedy:
            self.sum("largest logit", "vocab", 1, self.rows, self.wide)
        if sampler.top_k is not None:
            candidates = min(sampler.top_k, self.local("vocab"))
            entry = 1, self.rows, candidates, self.wide
            self.write("all_gather", "top-k candidates", self.num_shards("vocab"), entry)
        if sampler.top_p is not None:
            self.sum("top-p sum", "vocab", 1, self.rows, 4)
            self.sum("top-p candidates", "vocab", _NUCLEUS_ROUNDS, self.rows, _NUCLEUS_CANDIDATES, 4)
        self.sum("best logit", "vocab", 1, self.rows, self.wide)
        self.sum("best token", "vocab", 1, self.rows, 4)
        self.sum("unfinished rows", "batch", 1, 4)
