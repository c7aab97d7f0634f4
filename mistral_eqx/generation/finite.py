"""A logit that is not finite ends what needs it, with one sentence."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..errors import InputError
from ..parallel import Strategy, pmax


def marked(
    logits: Float[Array, "*batch vocab"], processed: Float[Array, "*batch vocab"] | None = None
) -> Float[Array, "*batch vocab"]:
    """Logits with plus infinity in place of what is not finite, so that the largest of a row tells of it.

    It fuses with the reduction that looks for the largest. NaN would not do: not every platform's maximum over devices
    keeps it.

    **Arguments:**

    - `logits`: the model's.
    - `processed`: what processors made of them, in which minus infinity forbids a token; the logits themselves unless
        given.
    """
    if processed is None:
        return jnp.where(jnp.isfinite(logits), logits, jnp.inf)
    return jnp.where(jnp.isfinite(logits) & ~jnp.isnan(processed), processed, jnp.inf)


def lost(largest: Float[Array, "*batch"]) -> Int[Array, "*batch"]:
    """What the largest of a row's `marked` logits tells: 1 if one was not finite, -1 if all are forbidden, or 0."""
    return jnp.where(jnp.isfinite(largest), 0, jnp.sign(largest)).astype(jnp.int32)


def proceeds(going: Bool[Array, " batch"], lost: Int[Array, " batch"], strategy: Strategy) -> Bool[Array, ""]:
    """Whether a loop goes on: a row does, and none is lost, on any device."""
    news = jnp.where(lost == 0, going.astype(jnp.int32), 2)
    # All devices leave the loop together, also those whose own rows have ended.
    return pmax(jnp.max(news), "batch", strategy) == 1


def not_finite(where: str, *, processors: bool = False) -> InputError:
    """The error for logits that are not finite.

    **Arguments:**

    - `where`: such as `"new token 1 of row 0"`.
    - `processors`: whether there are any, which may be the cause.
    """
    cause = " or what the processors made of them" if processors else ""
    return InputError(
        f"The model's logits for {where}{cause} are not finite; load it with check=True (--check) to find a weight "
        "that is damaged, or with dtype='float32' (--dtype float32) if its numbers are too large for 16 bits."
    )
