"""The sizes and constants of a model."""

import dataclasses
from typing import Annotated

from annotated_types import Ge, Le, Lt

from .checks import Count, CountOrZero, check_fields
from .errors import InputError
from .rope import AbstractRopeScaling, Magnitude, QueryScaling, Rope, YarnScaling


# Far above every published model; the product of two sizes still fits into a 64-bit integer.
Size = Annotated[int, Ge(1), Le(2**24)]
# Published models have at most some hundred layers. The limit bounds loops over layers before weights are read.
Layers = Annotated[int, Ge(1), Le(10_000)]
# Published models have 1e4 to 1e11. Below 1 or far above, wavelengths leave the range of float32.
Base = Annotated[float, Ge(1), Le(1e18)]
# Published models have 1e-5 or 1e-6. A smaller constant than 1e-20 is lost in float32.
Epsilon = Annotated[float, Ge(1e-20), Lt(1)]


@dataclasses.dataclass(frozen=True)
class Routing:
    """The experts of a layer, and how many of them compute each token
    ([Mixtral](https://arxiv.org/abs/2401.04088), [DeepSeekMoE](https://arxiv.org/abs/2401.06066)).

    **Attributes:**

    - `experts`: feed-forward networks in each layer.
    - `per_token`: experts that the router chooses for each token.
    - `hidden`: width of each expert; the config's `hidden` unless given.
    - `shared`: experts that compute every token, beside those that the router chooses. They are one feed-forward layer
        of `shared` times the width of an expert.
    - `first_dense`: how many layers, the first ones, have a dense feed-forward layer and no experts.
    - `groups`, `groups_per_token`: into how many groups of consecutive experts the experts are divided, and how many
        groups the experts of a token come from. Those are the groups whose two best experts are the most probable.
    - `scale`: the factor of the chosen experts' shares.
    - `normalized`: whether the shares are divided by their sum before.

    **Raises:** `ValueError` if a field is of another type or outside its range, or a token needs more experts or groups
    than there are.
    """

    experts: Size
    per_token: Size
    hidden: Size | None = None
    shared: CountOrZero = 0
    first_dense: CountOrZero = 0
    groups: Size = 1
    groups_per_token: Size = 1
    scale: Magnitude = 1.0
    normalized: bool = True

    def __post_init__(self):
        check_fields(self, "The config's routing.{}".format)
        if self.per_token > self.experts:
            raise InputError(
                f"The config routes each token to {self.per_token} experts, but a layer has {self.experts}; route it "
                "to at most as many.",
                key="per_token",
            )
        size = self.experts // self.groups
        if self.groups > 1 and (size * self.groups != self.experts or size < 2):
            raise InputError(
                f"The config divides {self.experts} experts into {self.groups} groups, but groups must have the same "
                "number of experts, at least two; choose another number of groups.",
                key="groups",
            )
        if self.groups_per_token > self.groups or self.per_token > size * self.groups_per_token:
            raise InputError(
                f"The config routes each token to {self.per_token} experts of {self.groups_per_token} groups, but a "
                f"layer has {self.groups} groups of {size} experts; allow more groups or fewer experts for each token.",
                key="groups_per_token",
            )


@dataclasses.dataclass(frozen=True)
class Latent:
    """The sizes of latent attention, in which keys and values are computed from one short vector for each token
    ([DeepSeek-V2](https://arxiv.org/abs/2405.04434)).

    **Attributes:**

    - `q_rank`: width of the vector from which the queries of all heads are computed.
    - `kv_rank`: width of the latent, from which the keys and values of all heads are computed.
    - `nope_dim`, `rope_dim`: entries of each query and key without and with a rotary embedding. All heads share the
        rotated entries of the keys.
    - `value_dim`: entries of each value.
    - `eps`: the constant in the denominator of the norms of both vectors.
    - `scale`: the factor of the scores beside `1 / sqrt(nope_dim + rope_dim)`.

    **Raises:** `ValueError` if a field is of another type or outside its range, or `rope_dim` is odd.
    """

    q_rank: Size
    kv_rank: Size
    nope_dim: Size
    rope_dim: Size
    value_dim: Size
    eps: Epsilon = 1e-6
    scale: Magnitude = 1.0

    def __post_init__(self):
        check_fields(self, "The config's latent.{}".format)
        if self.rope_dim % 2:
            raise InputError(
                f"The config's latent.rope_dim is {self.rope_dim}, but it must be even: the rotary embedding rotates "
                "pairs.",
                key="rope_dim",
            )

    @property
    def cached(self) -> int:
        """The numbers that a cache stores for each token of a layer: the latent and the rotated entries of the key."""
        return self.kv_rank + self.rope_dim

    @property
    def expanded(self) -> int:
        """The numbers that each head computes from a latent: the other entries of the key, and the value."""
        return self.nope_dim + self.value_dim


@dataclasses.dataclass(frozen=True)
class MistralConfig:
    """The sizes and constants of a Mistral-family model, dense or with experts.

    **Attributes:**

    - `vocab`, `embed`, `hidden`, `layers`: tokens in the vocabulary, width of the residual stream, width of the
        feed-forward layer (of each expert, if it has experts), number of blocks.
    - `kv_heads`, `q_per_kv`, `head_dim`: key/value heads, query heads that share each of them, entries per head.
        With latent attention, `q_per_kv` is 1 and `head_dim` is `nope_dim + rope_dim`.
    - `rope_theta`: the base of the rotary embedding's wavelengths.
    - `norm_eps`: the constant in the denominator of RMSNorm.
    - `max_positions`: the longest context, in tokens.
    - `windows`: for each layer, how many positions a query attends to, itself included; `None` for all up to its own.
    - `tied`: whether the output head is the embedding table.
    - `bos_id`, `eos_ids`: the token that starts a sequence, if any, and the end-of-sequence tokens.
    - `rope_scaling`: how the rotary embedding's angles are scaled for long contexts, if they are.
    - `query_scaling`: how queries grow with their position, if they do.
    - `routing`: the experts of each layer; `None` for a dense model.
    - `latent`: the sizes of latent attention; `None` for grouped-query attention.

    **Raises:** `ValueError` if a field is of another type or outside its range, `head_dim` is odd (a rotary pair would
    be missing its second entry), `windows` does not have one entry a layer, YaRN has a `rope_theta` of 1, or latent
    attention has other heads or windows.
    """

    vocab: Size
    embed: Size
    hidden: Size
    layers: Layers
    kv_heads: Size
    q_per_kv: Size
    head_dim: Size
    rope_theta: Base
    norm_eps: Epsilon
    max_positions: Count
    windows: tuple[Count | None, ...]
    tied: bool = False
    bos_id: CountOrZero | None = None
    eos_ids: tuple[CountOrZero, ...] = ()
    rope_scaling: AbstractRopeScaling | None = None
    query_scaling: QueryScaling | None = None
    routing: Routing | None = None
    latent: Latent | None = None

    def __post_init__(self):
        check_fields(self, "The config's {}".format)
        if self.latent is not None:
            self._check_latent(self.latent)
        elif self.head_dim % 2:
            raise InputError(
                f"The config's head_dim is {self.head_dim}, but it must be even: the rotary embedding rotates pairs.",
                key="head_dim",
            )
        if len(self.windows) != self.layers:
            raise InputError(
                f"The config has {len(self.windows)} windows for {self.layers} layers; give one entry per layer, "
                "None for a layer without a window.",
                key="windows",
            )
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta == 1:
            raise InputError(
                "The config's rope_theta is 1, but YaRN scales by wavelengths, which it makes all equal; give the base "
                "that the model was trained with.",
                key="rope_theta",
            )

    def _check_latent(self, latent: Latent):
        if self.head_dim != latent.nope_dim + latent.rope_dim or self.q_per_kv != 1:
            raise InputError(
                f"The config has latent attention with {self.q_per_kv} query heads for each key/value head of "
                f"{self.head_dim} entries, but a head must have its own keys and latent.nope_dim + latent.rope_dim = "
                f"{latent.nope_dim + latent.rope_dim} entries; correct q_per_kv or head_dim.",
                key="head_dim",
            )
        if set(self.windows) != {None}:
            raise InputError(
                "The config has latent attention in layers with windows, which no model combines; give None for each "
                "layer in windows.",
                key="windows",
            )

    @property
    def rope(self) -> Rope:
        """The angles of the rotary embedding."""
        dim = self.head_dim if self.latent is None else self.latent.rope_dim
        return Rope(dim, self.rope_theta, self.rope_scaling, self.query_scaling)

    @property
    def q_heads(self) -> int:
        """The number of query heads."""
        return self.kv_heads * self.q_per_kv

    @property
    def value_dim(self) -> int:
        """The number of entries of each value."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def experts(self) -> int:
        """The number of experts of each layer; 0 for a dense model."""
        return 0 if self.routing is None else self.routing.experts

    @property
    def routes(self) -> int:
        """The number of scores that a router computes for each token, one for each expert."""
        return self.experts

    @property
    def expert_hidden(self) -> int:
        """The width of each expert."""
        return self.hidden if self.routing is None or self.routing.hidden is None else self.routing.hidden

    @property
    def dense_layers(self) -> int:
        """The number of layers, the first ones, without experts."""
        return self.layers if self.routing is None else min(self.routing.first_dense, self.layers)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension of the weights, by its name."""
        names = "vocab", "embed", "hidden", "experts", "routes", "kv_heads", "q_per_kv", "head_dim", "value_dim"
        found = {name: getattr(self, name) for name in names}
        if self.routing is not None:
            found |= {"expert_hidden": self.expert_hidden, "shared_hidden": self.routing.shared * self.expert_hidden}
        if self.latent is not None:
            found |= {name: getattr(self.latent, name) for name in ("q_rank", "kv_rank", "cached", "expanded")}
        return found

    def matrix_entries(self, experts: int) -> int:
        """The entries of the matrices of all blocks, as if layers with experts had so many of them."""
        heads, latent = self.q_heads, self.latent
        attention = 2 * self.embed * self.head_dim * (heads + self.kv_heads)
        if latent is not None:
            attention = latent.q_rank * (self.embed + heads * self.head_dim) + self.embed * latent.cached
            attention += heads * (latent.kv_rank * latent.expanded + latent.value_dim * self.embed)
        routed = experts + (0 if self.routing is None else self.routing.shared)
        dense = 3 * self.embed * self.hidden
        sparse = self.embed * (3 * self.expert_hidden * routed + self.routes)
        return self.layers * attention + self.dense_layers * dense + (self.layers - self.dense_layers) * sparse

    @property
    def parameters(self) -> int:
        """The number of weights of the model; a tied head is counted once, with the embedding."""
        norms = 2 * self.embed + (0 if self.latent is None else self.latent.q_rank + self.latent.kv_rank)
        tables = 1 if self.tied else 2
        return tables * self.vocab * self.embed + self.matrix_entries(self.experts) + self.layers * norms + self.embed
