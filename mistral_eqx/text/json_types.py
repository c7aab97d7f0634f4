"""Values of JSON types, from values that a user gave."""

import json
from typing import Any

from ..documents import DEEPEST, depth
from ..errors import InputError


def to_json_types(value: Any, name: str) -> Any:
    """Copies a value as text, numbers, lists and dicts, so that a template cannot call methods of a user's object.

    **Arguments:**

    - `value`: the value.
    - `name`: its plural name in messages, such as `"The messages"`.

    **Raises:** `InputError` if the value has another type in it, or nests deeper than `DEEPEST` levels.
    """
    try:
        converted = json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} must consist of text, numbers, lists and dicts: {error}.") from error
    if depth(converted) > DEEPEST:
        rest = name.removeprefix("The ")
        raise InputError(f"{name} nest deeper than {DEEPEST} levels; give {rest} with less nesting.")
    return converted
