"""Which key each query sees."""

from jaxtyping import Array, Bool, Int


def visible(
    positions: Int[Array, "batch seq"], kv_positions: Int[Array, "batch kv_seq"], window: int | None
) -> Bool[Array, "batch seq kv_seq"]:
    """Which keys each query sees: those before it and itself, inside the window.

    **Arguments:**

    - `positions`: the position of each query.
    - `kv_positions`: the position of each key; a negative one is padding and is never seen.
    - `window`: how many positions a query sees, itself included, or `None` for all.
    """
    distance = positions[:, :, None] - kv_positions[:, None, :]
    seen = (kv_positions >= 0)[:, None, :] & (distance >= 0)
    return seen if window is None else seen & (distance < window)
