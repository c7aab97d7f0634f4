"""The sizes and constants of a model."""

import dataclasses
from typing import Annotated

from annotated_types import Ge, Le, Lt

from .checks import Count, CountOrZero, check_fields
from .errors import InputError
from .rope import AbstractRopeScaling, QueryScaling, Rope, YarnScaling


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
    ([Mixtral](https://arxiv.org/abs/2401.04088)).

    **Attributes:**

    - `experts`: feed-forward networks in each layer.
    - `per_token`: experts that the router chooses for each token.

    **Raises:** `ValueError` if a field is of another type or outside its range, or `per_token` exceeds `experts`.
    """

    experts: Size
    per_token: Size

    def __post_init__(self):
        check_fields(self, "The config's routing.{}".format)
        if self.per_token > self.experts:
            raise InputError(
                f"The config routes each token to {self.per_token} experts, but a layer has {self.experts}; route it "
                "to at most as many.",
                key="per_token",
            )


@dataclasses.dataclass(frozen=True)
class MistralConfig:
    """The sizes and constants of a Mistral-family model, dense or with experts.

    **Attributes:**

    - `vocab`, `embed`, `hidden`, `layers`: tokens in the vocabulary, width of the residual stream, width of the
        feed-forward layer (of each expert, if it has experts), number of blocks.
    - `kv_heads`, `q_per_kv`, `head_dim`: key/value heads, query heads that share each of them, entries per head.
    - `rope_theta`: the base of the rotary embedding's wavelengths.
    - `norm_eps`: the constant in the denominator of RMSNorm.
    - `max_positions`: the longest context, in tokens.
    - `windows`: for each layer, how many positions a query attends to, itself included; `None` for all up to its own.
    - `tied`: whether the output head is the embedding table.
    - `bos_id`, `eos_ids`: the token that starts a sequence, if any, and the end-of-sequence tokens.
    - `rope_scaling`: how the rotary embedding's angles are scaled for long contexts, if they are.
    - `query_scaling`: how queries grow with their position, if they do.
    - `routing`: the experts of each layer; `None` for a dense model.

    **Raises:** `ValueError` if a field is of another type or outside its range, `head_dim` is odd (a rotary pair would
    be missing its second entry), `windows` does not have one entry a layer, or YaRN has a `rope_theta` of 1.
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

    def __post_init__(self):
        check_fields(self, "The config's {}".format)
        if self.head_dim % 2:
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

    @property
    def rope(self) -> Rope:
        """The angles of the rotary embedding."""
        return Rope(self.head_dim, self.rope_theta, self.rope_scaling, self.query_scaling)

    @property
    def q_heads(self) -> int:
        """The number of query heads."""
        return self.kv_heads * self.q_per_kv

    @property
    def experts(self) -> int:
        """The number of experts of each layer; 0 for a dense model."""
        return 0 if self.routing is None else self.routing.experts

    @property
    def routes(self) -> int:
        """The number of scores that a router computes for each token, one for each expert."""
        return self.experts

    @property
    def parameters(self) -> int:
        """The number of weights of the model; a tied head is counted once, with the embedding."""
        attention = 2 * self.embed * self.head_dim * (self.q_heads + self.kv_heads)
        feed_forward = 3 * self.embed * self.hidden * max(self.experts, 1) + self.embed * self.routes
        block = attention + feed_forward + 2 * self.embed
        tables = 1 if self.tied else 2
        return tables * self.vocab * self.embed + self.layers * block + self.embed
