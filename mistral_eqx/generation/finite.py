"""Stops generation with one sentence if a logit is not finite."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..errors import InputError
from ..parallel import Strategy, pmax


def marked(
    logits: Float[Array, "*batch vocab"], processed: Float[Array, "*batch vocab"] | None = None
) -> Float[Array, "*batch vocab"]:
    """Logits with plus infinity in place of every value that is not finite, so that a row's maximum shows it.

    This fuses with the reduction to the maximum. NaN would not work: on some platforms the maximum over devices drops
    it.

    **Arguments:**

    - `logits`: the model's.
    - `processed`: the logits after the processors, where minus infinity forbids a token; by default `logits`.
    """
    if processed is None:
        return jnp.where(jnp.isfinite(logits), logits, jnp.inf)
    return jnp.where(jnp.isfinite(logits) & ~jnp.isnan(processed), processed, jnp.inf)


def lost(largest: Float[Array, "*batch"]) -> Int[Array, "*batch"]:
    """From the largest `marked` logit of each row: 1 if a logit was not finite, -1 if all are forbidden, else 0."""
    return jnp.where(jnp.isfinite(largest), 0, jnp.sign(largest)).astype(jnp.int32)


def proceeds(going: Bool[Array, " batch"], lost: Int[Array, " batch"], strategy: Strategy) -> Bool[Array, ""]:
    """Whether the loop continues: on some device a row continues, and on no device a row is lost."""
    news = jnp.where(lost == 0, going.astype(jnp.int32), 2)
    # All devices leave the loop together, even those whose own rows have ended.
    return pmax(jnp.max(news), "batch", strategy) == 1


def not_finite(where: str, *, processors: bool = False) -> InputError:
    """The error for logits that are not finite.

    **Arguments:**

    - `where`: for example `"new token 1 of row 0"`.
    - `processors`: whether the sampler has processors, which may be the cause.
    """
    cause = " or what the processors made of them" if processors else ""
    return InputError(
        f"The model's logits for {where}{cause} are not finite; load it with check=True (--check) to find a weight "
        "that is damaged, or with dtype='float32' (--dtype float32) if its numbers are too large for 16 bits."
    )
