"""What devices exchange in a forward pass or a decoding step, in closed form: nothing is traced or compiled."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from ..config import MistralConfig
from ..errors import InputError
from ..generation import Sampler
from ..parallel import Strategy


# How the least probability of a nucleus is found where the vocabulary is split: in turns, each of which tries so many
# candidates.
_NUCLEUS_TURNS, _NUCLEUS_CANDIDATES = 6, 31


@dataclasses.dataclass(frozen=True)
class Collective:
    """Some equal exchanges.

    **Attributes:**

    - `kind`: the operation.
    - `what`: what is exchanged, such as `"attention output"`.
    - `count`: how often, all layers together.
    - `bytes`: the size of what one device puts into one of them, as StableHLO shows it: of an `all_reduce` as much
        comes out, of an `all_gather` `devices` times as much, of a `reduce_scatter` as many times less. What a device
        then sends over its links depends on the algorithm; a ring moves `2 * (devices - 1) / devices` of it for an
        `all_reduce`, `devices - 1` times it for an `all_gather`, `(devices - 1) / devices` for a `reduce_scatter`.
    - `devices`: how many take part in one of them. The devices of a mesh that do not are in other groups, which do
        the same at the same time.
    """

    kind: Literal["all_reduce", "all_gather", "reduce_scatter"]
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
) -> list[Collective]:
    """What `model(ids)` exchanges.

    **Arguments:**

    - `config`: the model's.
    - `strategy`: which dimensions are split over which mesh axes.
    - `axes`: the size of each axis of the mesh.
    - `batch`, `seq`: the shape of `ids`, all devices together.
    - `dtype`: the model's precision. Sums in the softmax, in norms and of logits are exchanged in float32 at least,
        as they are computed.

    **Returns:** the exchanges, in the order of their first. A group of one device exchanges nothing and has none.

    **Raises:** `ValueError` if the strategy does not fit the config or the axes, as `Strategy.check` says, or
    `batch` cannot be split.
    """
    ledger = Ledger(config, strategy, axes, batch, dtype)
    ledger.model(seq, -(-seq // ledger.parts("kv_seq")), logits=seq)
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
) -> list[Collective]:
    """What reading `seq` tokens into a cache exchanges; only the last one's logits are computed.

    **Arguments:** those of [`mistral_eqx.planning.forward_pass`][], and

    - `kv_seq`: the slots of the cache, all devices together.

    **Raises:** `ValueError` as there, and if `kv_seq` cannot be split.
    """
    ledger = Ledger(config, strategy, axes, batch, dtype)
    ledger.model(seq, ledger.share("kv_seq", kv_seq), logits=1)
    return ledger.entries


def decoding_step(
    config: MistralConfig,
    strategy: Strategy,
    axes: Mapping[str, int],
    *,
    batch: int,
    kv_seq: int,
    dtype: DTypeLike = jnp.bfloat16,
    sampler: Sampler | None = None,
) -> list[Collective]:
    """What one turn of the decoding loop exchanges: the forward pass of one token a row, and what chooses the next.

    **Arguments:** those of [`mistral_eqx.planning.prefill`][], and

    - `sampler`: how the token is chosen; greedy unless given.
    """
    ledger = Ledger(config, strategy, axes, batch, dtype)
    ledger.model(1, ledger.share("kv_seq", kv_seq), logits=1)
    ledger.choice(sampler or Sampler())
    return ledger.entries


class Ledger:
    """Writes down exchanges in the order in which the modules of `nn` make them."""

    def __init__(
        self, config: MistralConfig, strategy: Strategy, axes: Mapping[str, int], batch: int, dtype: DTypeLike
    ):
        strategy.check(config, AbstractMesh(tuple(axes.values()), tuple(axes)))
        self.config, self.strategy, self.axes = config, strategy, axes
        self.rows = self.share("batch", batch)
        self.narrow = jnp.dtype(dtype).itemsize
        self.wide = max(self.narrow, 4)
        self.entries: list[Collective] = []

    def parts(self, dims: str) -> int:
        """Into how many parts any of `dims` together are split."""
        return self.strategy.parts(dims, self.axes)

    def share(self, dim: str, size: int) -> int:
        """One device's share of a dimension whose size is a call's."""
        if size % self.parts(dim):
            raise InputError(
                f"A {dim} of {size} cannot be split over {self.parts(dim)} devices; take a multiple of that."
            )
        return size // self.parts(dim)

    def local(self, dims: str) -> int:
        """How many entries one device has of `dims` of the config."""
        return math.prod(getattr(self.config, dim) // self.parts(dim) for dim in dims.split())

    def write(self, kind: Literal["all_reduce", "all_gather", "reduce_scatter"], what: str, devices: int, entry: tuple):
        if devices > 1:
            count, *sizes = entry
            self.entries.append(Collective(kind, what, count, math.prod(sizes), devices))

    def sum(self, what: str, dims: str, *entry: int):
        """An `all_reduce` over the devices that share `dims`; `entry`: how often, and factors of the bytes."""
        self.write("all_reduce", what, self.parts(dims), entry)

    def scattered(self, seq: int) -> int:
        """Among how many devices the residual stream's tokens are dealt out."""
        return self.parts("tokens") if seq % self.parts("tokens") == 0 else 1

    def sum_tokens(self, what: str, dims: str, count: int, seq: int):
        """Adds up what goes to the residual stream, where each device receives its own tokens."""
        devices, size = self.scattered(seq), self.rows * seq * self.local("embed") * self.narrow
        self.write("all_reduce", what, self.parts(dims) // devices, (count, size))
        self.write("reduce_scatter", what, devices, (count, size))

    def all_tokens(self, what: str, count: int, seq: int):
        """Puts the tokens of the residual stream together again."""
        devices = self.scattered(seq)
        size = self.rows * (seq // devices) * self.local("embed") * self.narrow
        self.write("all_gather", what, devices, (count, size))

    def model(self, seq: int, kv_seq: int, *, logits: int):
        """The layers' exchanges, for `seq` tokens that see `kv_seq` keys of each device."""
        layers, tokens, heads = self.config.layers, self.rows * seq, self.local("kv_heads q_per_kv")
        self.sum_tokens("embedding", "vocab", 1, seq)

        self.sum("attention norm", "embed", layers, tokens, self.wide)
        self.all_tokens("attention input", layers, seq)
        self.sum("queries", "embed", layers, tokens, self.local("kv_heads q_per_kv head_dim"), self.narrow)
        self.sum("keys and values", "embed", 2 * layers, tokens, self.local("kv_heads head_dim"), self.narrow)
        self.sum("attention scores", "head_dim", layers, tokens, heads, kv_seq, self.wide)
        self.sum("softmax maximum", "kv_seq", layers, tokens, heads, self.wide)
        self.sum("softmax sum and values", "kv_seq", layers, tokens, heads, self.local("head_dim") + 1, self.wide)
        self.sum_tokens("attention output", "kv_heads q_per_kv head_dim", layers, seq)

        self.sum("feed-forward norm", "embed", layers, tokens, self.wide)
        self.all_tokens("feed-forward input", layers, seq)
        self.sum("gate and up", "embed", 2 * layers, tokens, self.local("hidden"), self.narrow)
        self.sum_tokens("feed-forward output", "hidden", layers, seq)

        self.sum("last norm", "embed", 1, tokens, self.wide)
        self.all_tokens("last output", 1, seq)
        self.sum("logits", "embed", 1, self.rows * logits, self.local("vocab"), self.wide)

    def choice(self, sampler: Sampler):
        """What choosing the next token exchanges."""
        if not sampler.greedy:
            self.sum("largest logit", "vocab", 1, self.rows, self.wide)
        if sampler.top_k is not None:
            candidates = min(sampler.top_k, self.local("vocab"))
            entry = 1, self.rows, candidates, self.wide
            self.write("all_gather", "top-k candidates", self.parts("vocab"), entry)
        if sampler.top_p is not None:
            self.sum("top-p sum", "vocab", 1, self.rows, 4)
            self.sum("top-p candidates", "vocab", _NUCLEUS_TURNS, self.rows, _NUCLEUS_CANDIDATES, 4)
        self.sum("best logit", "vocab", 1, self.rows, self.wide)
        self.sum("best token", "vocab", 1, self.rows, 4)
        self.sum("unfinished rows", "batch", 1, 4)
