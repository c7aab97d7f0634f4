"""From token ids to vectors, and from vectors to logits."""

import equinox as eqx
from jaxtyping import Array, Float, Int

from ..parallel import SINGLE, Strategy
from .weight import AbstractWeight


class Embedding(eqx.Module):
    """A table with one row a token.

    **Attributes:**

    - `weight`: the table, dimensions `vocab embed`.
    - `strategy`: which dimensions are split over which mesh axes.
    """

    weight: AbstractWeight
    strategy: Strategy = SINGLE

    def __call__(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        _refuse_split_vocab(self.strategy)
        return self.weight.rows(ids)


class Unembedding(eqx.Module):
    """The output head: one logit a token of the vocabulary.

    Its weight may be the embedding's, as in a model with tied embeddings.

    **Attributes:**

    - `weight`: dimensions `vocab embed`.
    - `strategy`: which dimensions are split over which mesh axes.
    """

    weight: AbstractWeight
    strategy: Strategy = SINGLE

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq vocab"]:
        """Computes logits, in float32 for 16-bit activations: rounding them would make equal what is not."""
        _refuse_split_vocab(self.strategy)
        return self.weight.contract(x, "embed", "vocab")


def _refuse_split_vocab(strategy: Strategy):
    # A device would take its part for the whole, and give wrong rows without a word.
    if strategy.split_over("vocab"):
        raise ValueError(
            f"The strategy {strategy.layout!r} splits 'vocab', which the embedding and the head cannot be yet; "
            "leave that entry out."
        )
