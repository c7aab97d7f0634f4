"""Whole numbers, as a user gives them."""

import operator
from typing import Any

from ..errors import InputError


def is_whole(number: Any) -> bool:
    """Whether it is an integer of any library, and no fraction or text."""
    try:
        operator.index(number)
    except TypeError:
        return False
    return True


def check_whole(name: str, number: Any, least: int):
    """Refuses what is no whole number, or too small a one.

    **Arguments:**

    - `name`: what the number is, as the user knows it.
    - `number`: what was given.
    - `least`: the smallest that is allowed.

    **Raises:** `ValueError` if it is not.
    """
    if not is_whole(number):
        raise InputError(f"{name} is {number!r}; it must be a whole number, at least {least}.")
    if number < least:
        raise InputError(f"{name} is {number}; it must be at least {least}.")
