"""The operations of a pass and the weights that it reads, on one device, in closed form."""

import dataclasses
from collections.abc import Iterator, Mapping

from ..config import MistralConfig
from ..parallel import Strategy


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """The entries of all matrices that are split alike, and their dimensions."""

    entries: int
    dims: str
    routed: bool = False
    head: bool = False


def operations(
    config: MistralConfig,
    strategy: Strategy,
    axes: Mapping[str, int],
    *,
    batch: int,
    seq: int,
    context: float,
    logits: int,
) -> float:
    """The operations of a forward pass on one device: two for each entry of a matrix and token, four for each score.

    A routed token counts with the experts that compute it, evenly spread over the devices that have some.

    **Arguments:**

    - `config`, `strategy`, `axes`: as for [`mistral_eqx.planning.forward_pass`][].
    - `batch`, `seq`: the rows, and the tokens of each, over all devices.
    - `context`: the number of keys that a token attends to, on average; a window may hide some of them.
    - `logits`: the tokens of each row that have logits.
    """
    # Devices that split the tokens of a row compute a new one together.
    rows = "batch seq" if seq > 1 else "batch"
    total = 0.0
    for one in _matrices(config):
        share = config.routing.per_token / config.experts if one.routed and config.routing is not None else 1.0
        tokens = batch * (logits if one.head else seq)
        total += 2 * tokens * share * one.entries / strategy.parts(f"{rows} {one.dims}", axes)
    # A new token is compared with latents, if there are any, and a prompt with the keys that they stand for.
    latents = config.latent is not None and seq == 1
    width = config.latent.cached if latents and config.latent is not None else config.head_dim
    keys = sum(context if window is None else min(context, window) for window in config.windows)
    scores = 4 * batch * seq * config.q_heads * width * keys
    return total + scores / strategy.parts(f"{rows} layers kv_heads q_per_kv head_dim kv_seq", axes)


def weights_read(config: MistralConfig, strategy: Strategy, axes: Mapping[str, int], *, tokens: int) -> float:
    """The share of a device's matrices that a pass over `tokens` tokens reads.

    Of the experts these are the ones that some token is expected to choose, if each is equally likely. The embedding
    is not read, but for a row of each token, unless it is the head too.
    """
    total = _embedding(config) / strategy.parts("vocab embed", axes)
    read = 0.0
    for one in _matrices(config):
        entries = one.entries / strategy.parts(one.dims, axes)
        chosen = 1.0
        if one.routed and config.routing is not None:
            chosen = 1 - (1 - config.routing.per_token / config.experts) ** tokens
        read, total = read + chosen * entries, total + entries
    return read / total


def device_entries(
    config: MistralConfig, strategy: Strategy, axes: Mapping[str, int], *, over: str = "", blocks: bool = False
) -> float:
    """The entries of all matrices on one device; norms are left out.

    **Arguments:**

    - `over`: further dimensions whose axes split each matrix, as ZeRO does.
    - `blocks`: whether to count those of blocks alone, without the table and the head.
    """
    embedding = 0.0 if blocks else _embedding(config) / strategy.parts(f"vocab embed {over}", axes)
    return embedding + sum(
        one.entries / strategy.parts(f"{one.dims} {over}", axes)
        for one in _matrices(config)
        if not (blocks and one.head)
    )


def _embedding(config: MistralConfig) -> int:
    """The entries of the table, unless it is the head too."""
    return 0 if config.tied else config.vocab * config.embed


def _matrices(config: MistralConfig) -> Iterator[_Matrices]:
    """All matrices that compute tokens, the head with them."""
    layers, embed, heads = config.layers, config.embed, config.q_heads
    if config.latent is None:
        yield _Matrices(2 * layers * embed * config.head_dim * heads, "layers kv_heads q_per_kv head_dim embed")
        yield _Matrices(2 * layers * embed * config.head_dim * config.kv_heads, "layers kv_heads head_dim embed")
    else:
        latent = config.latent
        yield _Matrices(layers * embed * (latent.q_rank + latent.cached), "layers")
        of_head = latent.q_rank * config.head_dim + latent.kv_rank * latent.expanded + latent.value_dim * embed
        yield _Matrices(layers * heads * of_head, "layers kv_heads")
    yield _Matrices(3 * config.dense_layers * embed * config.hidden, "layers hidden embed")
    if config.routing is not None:
        sparse = layers - config.dense_layers
        width = 3 * sparse * embed * config.expert_hidden
        yield _Matrices(width * config.routing.shared, "layers hidden")
        yield _Matrices(width * config.experts, "layers experts hidden", routed=True)
        yield _Matrices(sparse * embed * config.routes, "layers")
    yield _Matrices(config.vocab * embed, "vocab embed", head=True)
