"""The embedding table and the output head."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..parallel import SINGLE, AbstractNamed, Strategy, psum, psum_tokens, shard_index
from .weight import AbstractWeight


class Embedding(AbstractNamed):
    """A table with one row for each token.

    If the strategy splits `vocab`, each device looks up the tokens whose rows it holds, and the results are added up:
    all but one are zero.

    **Attributes:**

    - `weight`: the table, dimensions `vocab embed`.
    - `strategy`: which dimensions are split over which mesh axes.
    """

    weight: AbstractWeight
    strategy: Strategy = SINGLE

    def __call__(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch tokens embed"]:
        if not self.strategy.axes("vocab"):
            return self.weight.rows(ids)
        shard, _ = shard_index("vocab", self.strategy)
        size = self.weight.row_count
        row = ids - shard * size
        own = (row >= 0) & (row < size)
        found = self.weight.rows(jnp.where(own, row, 0))
        return psum_tokens(jnp.where(own[:, :, None], found, jnp.zeros((), found.dtype)), "vocab", self.strategy)

    def array_dims(self) -> dict[str, str]:
        return _named(self.weight)


class Unembedding(AbstractNamed):
    """The output head: one logit for each token of the vocabulary.

    Its weight may be the embedding's, as in a model with tied embeddings. If the strategy splits `vocab`, each device
    computes the logits of its shard, and devices exchange nothing.

    **Attributes:**

    - `weight`: dimensions `vocab embed`.
    - `strategy`: which dimensions are split over which mesh axes.
    """

    weight: AbstractWeight
    strategy: Strategy = SINGLE

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq vocab"]:
        """Computes logits, in float32 for 16-bit activations: rounding would make different logits equal."""
        return psum(self.weight.contract(x, "embed", "vocab"), "embed", self.strategy)

    def array_dims(self) -> dict[str, str]:
        return _named(self.weight)


def _named(weight: AbstractWeight) -> dict[str, str]:
    return {f"weight.{field}": dims for field, dims in weight.dims("embed", "vocab").items()}
