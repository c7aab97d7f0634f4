"""Types and ranges of settings: declared beside each field, checked in one place.

A field's annotation, such as `Count` or `Literal["none", "block"]`, gives its type and range; `check_fields` and
`checked` check values against it. Numbers are always finite.
"""

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from .documents import shown
from .errors import InputError


# The largest size is the largest signed 32-bit integer: no dimension of an array is longer here.
Count = Annotated[int, Ge(1), Le(2**31 - 1)]
CountOrZero = Annotated[int, Ge(0), Le(2**31 - 1)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
# The codes of a quantized KV cache.
CacheDType = Literal["int8", "float8_e4m3"]

_BOUNDS: dict[Any, tuple[str, Callable[[Any, Any], bool]]] = {
    Gt: ("greater than", lambda value, bound: value > bound.gt),
    Ge: ("at least", lambda value, bound: value >= bound.ge),
    Lt: ("less than", lambda value, bound: value < bound.lt),
    Le: ("at most", lambda value, bound: value <= bound.le),
}
_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a table",
}


def checked(
    value: Any,
    kind: Any,
    name: str,
    *,
    file: str | os.PathLike[str] | None = None,
    key: str | None = None,
    remedy: str | None = None,
) -> Any:
    """Checks a value against an annotation.

    **Arguments:**

    - `value`: the value. An integer for a float becomes a float, and a numpy or JAX scalar becomes a Python one.
        Nothing else is converted: `True` is not an integer, `"5"` is not a number.
    - `kind`: `int`, `float`, `bool`, `str`, `Annotated` with bounds of the library annotated_types, `Literal`, a union,
        a list, tuple or dict of these, or another class.
    - `name`: the user's name for the value, such as `"The recipe's 'data.rows'"` or `"top_k"`.
    - `file`, `key`, `remedy`: as for [`mistral_eqx.InputError`][]; `key` is `name` unless given.

    **Returns:** the value.

    **Raises:** `InputError` that says what the value is and what it must be.
    """
    found = _fit(_plain(value), kind)
    if isinstance(found, _Wrong):
        raise InputError(
            f"{name} is {shown(value)}; {found.entry or 'it'} must be {found.wanted}.",
            file=file,
            key=key or name,
            remedy=remedy,
        )
    return found


def check_fields(settings: Any, name: Callable[[str], str] = str, *, file: str | os.PathLike[str] | None = None):
    """Checks each field of a dataclass against its annotation, and replaces it by the checked value.

    **Arguments:**

    - `settings`: an instance; its `__post_init__` calls this.
    - `name`: maps a field's name to the user's name for it.
    - `file`: the file that has the values.

    **Raises:** `InputError` that names the field.
    """
    kinds = kinds_of(type(settings))
    for field in dataclasses.fields(settings):
        value = checked(getattr(settings, field.name), kinds[field.name], name(field.name), file=file, key=field.name)
        object.__setattr__(settings, field.name, value)


def check_arguments(function: Any, **values: Any):
    """Checks arguments of a function against their annotations.

    **Raises:** `InputError` that names the argument.
    """
    kinds = kinds_of(function)
    for name, value in values.items():
        checked(value, kinds[name], name)


@functools.cache
def kinds_of(settings: Any) -> Mapping[str, Any]:
    """The annotation of each field of a dataclass, or of each argument of a function, bounds included."""
    return typing.get_type_hints(settings, include_extras=True)


@dataclasses.dataclass(frozen=True)
class _Wrong:
    """A failed check: what the value, or its entry `entry`, must be."""

    wanted: str
    entry: str | None = None


def _fit(value: Any, kind: Any) -> Any:
    """The value as a `kind`, or a `_Wrong`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _bounded(value, arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return _any_of(value, arguments)
    if origin is Literal:
        same = [choice for choice in arguments if type(choice) is type(value) and choice == value]
        return same[0] if same else _Wrong(f"one of {', '.join(map(repr, arguments))}")
    if origin in (list, tuple, Sequence):
        return _entries(value, origin, arguments)
    if origin in (dict, Mapping):
        return _values(value, arguments)
    if kind is Any:
        return value
    if kind is type(None):
        return None if value is None else _Wrong("left out")
    if kind is float:
        return _finite(value)
    if kind in (int, bool, str):
        return value if type(value) is kind else _Wrong(_NAMES[kind])
    return value if isinstance(value, kind) else _Wrong(_NAMES.get(kind, f"a {kind.__name__}"))


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str) or getattr(value, "shape", None) != ():
        return value
    return value.item()


def _finite(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _Wrong("a number")
    try:
        number = float(value)
    except OverflowError:
        return _Wrong(_NAMES[float])
    return number if math.isfinite(number) else _Wrong(_NAMES[float])


def _bounded(value: Any, kind: Any, bounds: tuple[Any, ...]) -> Any:
    found = _fit(value, kind)
    if isinstance(found, _Wrong):
        return found
    for bound in bounds:
        words, holds = _BOUNDS[type(bound)]
        if not holds(found, bound):
            return _Wrong(f"{words} {dataclasses.astuple(bound)[0]}")
    return found


def _any_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    found = [_fit(value, kind) for kind in kinds]
    for one in found:
        if not isinstance(one, _Wrong):
            return one
    complaints = [one for one, kind in zip(found, kinds, strict=True) if kind is not type(None)]
    # A complaint about an entry says more than one about the whole value.
    return next((one for one in complaints if one.entry is not None), None) or _Wrong(
        " or ".join(dict.fromkeys(one.wanted for one in complaints))
    )


def _entries(value: Any, origin: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return _Wrong("a list")
    found = [_fit(_plain(entry), arguments[0]) for entry in value]
    for number, one in enumerate(found):
        if isinstance(one, _Wrong):
            return _Wrong(one.wanted, f"its entry {number}")
    return tuple(found) if origin is tuple else found


def _values(value: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(value, Mapping):
        return _Wrong("a table")
    found = {key: _fit(_plain(entry), arguments[1]) for key, entry in value.items()}
    for key, one in found.items():
        if isinstance(one, _Wrong):
            return _Wrong(one.wanted, f"its entry {shown(key)}")
    return found
