"""A draft model in an engine: the layers of its cache are further layers of the ring.

So slots, positions and the pointer are those of the model, and what moves a row of the ring moves both. In a pass over
proposals the draft writes the same tokens into the same slots as the model. Steps without proposals leave their slots
empty in the draft's layers; before the next proposals, the draft reads the tokens that the model has in these slots.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from ..errors import InputError
from ..generation.flat import Flat
from ..generation.proposals import Draft, Speculate, checked_speculate
from ..nn import Cache, Mistral
from ..nn.block import check_whole
from ..nn.cache import AbstractLayerCache
from ..parallel import specs, spmd
from .ring import joined, parted


# A draft reads so many slots of all rows at a time.
_WIDTH = 16


def checked_proposer(speculate: Speculate | None, model: Mistral) -> Speculate | None:
    """Checks what proposes tokens in an engine of this model.

    **Raises:** `ValueError` if a draft has another vocabulary, is split in another way than the model, or the strategy
        splits `kv_seq`.
    """
    speculate = checked_speculate(speculate, model)
    if isinstance(speculate, Draft):
        draft = speculate.model
        check_whole(draft)
        if draft.strategy != model.strategy:
            raise InputError(
                f"The draft's strategy is {draft.strategy.layout!r} and the model's {model.strategy.layout!r}; an "
                "engine needs both split alike, by mistral_eqx.shard."
            )
        if model.strategy.axes("kv_seq"):
            raise InputError(
                f"The strategy {model.strategy.layout!r} splits 'kv_seq', which an engine with a draft cannot; use "
                "another strategy, or mistral_eqx.PromptLookup()."
            )
    return speculate


@eqx.filter_jit(donate="all-except-first")
def catch_up(kept: tuple[Flat, Int[Array, "batch text"], Int[Array | np.ndarray, ""]], carried: Flat) -> Flat:
    """Has the draft read what the model has in the last slots before the pointer.

    A slot that it knows already gets the same keys and values again.

    **Arguments:**

    - `kept`: the draft, the token at each position of each row's text, and the number of slots.
    - `carried`: the rows and the cache, donated and updated in place.
    """
    flat, texts, count = kept
    draft: Mistral = flat.tree
    strategy = draft.strategy

    def read(draft: Mistral, texts: Array, count: Array, cache: Cache) -> Cache:
        own, drafted = parted(cache, len(cache.layers) - draft.config.layers)
        size = cache.kv_seq

        def next_slots(
            carry: tuple[Array, tuple[AbstractLayerCache, ...]],
        ) -> tuple[Array, tuple[AbstractLayerCache, ...]]:
            left, layers = carry
            first = (cache.used - left) % size
            start = jnp.minimum(first, size - _WIDTH)
            positions = lax.dynamic_slice_in_dim(cache.positions, start, _WIDTH, axis=1)
            ids = jnp.take_along_axis(texts, jnp.maximum(positions, 0), axis=1)
            _, extended = draft.hidden(ids, positions, Cache(layers, cache.positions, start))
            return left - (start + _WIDTH - first), extended.layers

        _, layers = lax.while_loop(lambda carry: carry[0] > 0, next_slots, (count, drafted.layers))
        return joined(own, Cache(layers, cache.positions, cache.used))

    rows, cache = carried.tree
    layers, by_row = specs(cache, strategy), strategy.spec("batch")
    in_specs = specs(draft, strategy), by_row, strategy.spec(""), layers
    return Flat((rows, spmd(read, draft.mesh, in_specs, layers)(draft, texts, jnp.asarray(count), cache)))
