"""The one key of a format for the original context of both the rotary embedding and the queries."""

from typing import Any

from ..errors import InputError
from ..rope import QueryScaling


def add_original_positions(found: dict[str, Any], key: str, queries: QueryScaling, holder: str):
    """Writes the positions by whose multiples queries are scaled, unless the rotary embedding has written the same.

    **Arguments:**

    - `found`: the keys and values so far, to which the key is added.
    - `key`: the name of the original context.
    - `queries`: how queries are scaled.
    - `holder`: the format, as a message names it.

    **Raises:** `InputError` if the rotary embedding has another original context.
    """
    known = found.setdefault(key, queries.original_positions)
    if known != queries.original_positions:
        raise InputError(
            f"The queries are scaled by multiples of {queries.original_positions} positions and the rotary embedding "
            f"from {known}, but {holder} can hold one number for both; use the format 'mistral'.",
            key="query_scaling",
        )
