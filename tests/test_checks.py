"""Declared types and ranges."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest

from mistral_eqx import InputError
from mistral_eqx.checks import Count, Positive, Seed, Share, ShareBelowOne, check_fields, checked


@pytest.mark.parametrize(
    ("value", "kind", "found"),
    [
        (5, Count, 5),
        (np.int64(5), Count, 5),
        (jnp.asarray(5), Count, 5),
        (1, Positive, 1.0),
        (np.float32(0.5), Share, 0.5),
        (None, Count | None, None),
        ("b", Literal["a", "b"], "b"),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((1, 2), list[int], [1, 2]),
        ("x", str | list[str], "x"),
        (["x"], str | list[str], ["x"]),
        ({"a": 1}, dict[str, Any], {"a": 1}),
    ],
)
def test_what_fits_is_given_back(value, kind, found):
    result = checked(value, kind, "x")
    assert result == found
    assert type(result) is type(found)


@pytest.mark.parametrize(
    ("value", "kind", "must"),
    [
        (True, Count, "it must be a whole number"),
        (1.0, Count, "it must be a whole number"),
        ("1", Count, "it must be a whole number"),
        (0, Count, "it must be at least 1"),
        (2**31, Count, "it must be at most 2147483647"),
        (10**400, Count, "it must be at most 2147483647"),
        (-1, Seed, "it must be at least 0"),
        (None, Positive, "it must be a number"),
        (False, Positive, "it must be a number"),
        (math.nan, Positive, "it must be a finite number"),
        (-math.inf, float, "it must be a finite number"),
        (10**400, float, "it must be a finite number"),
        (0.0, Positive, "it must be greater than 0"),
        (1.5, Share, "it must be at most 1"),
        (1.0, ShareBelowOne, "it must be less than 1"),
        (-1, Count | None, "it must be at least 1"),
        ("c", Literal["a", "b"], "it must be one of 'a', 'b'"),
        (1, Literal[True, False], "it must be one of True, False"),
        ([1, "a"], list[int], "its entry 1 must be a whole number"),
        ({"a": "x"}, dict[str, int], "its entry 'a' must be a whole number"),
        (5, str | list[str], "it must be a text or a list"),
        ([1], str | list[str], "its entry 0 must be a text"),
        ("false", bool, "it must be true or false"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(value, kind, must):
    with pytest.raises(InputError) as caught:
        checked(value, kind, "The file's 'size'", key="size")
    assert str(caught.value).startswith("The file's 'size' is ")
    assert str(caught.value).endswith(f"; {must}.")
    assert caught.value.key == "size"


@dataclasses.dataclass(frozen=True)
class _Settings:
    rows: Count
    rate: Positive = 1.0

    def __post_init__(self):
        check_fields(self, "The {}".format)


def test_the_fields_of_a_dataclass():
    settings = _Settings(np.int32(3), 2)
    assert (settings.rows, settings.rate) == (3, 2.0)
    assert type(settings.rate) is float
    with pytest.raises(InputError, match="The rate is nan; it must be a finite number"):
        _Settings(3, math.nan)
    with pytest.raises(InputError, match="The rows is 0"):
        dataclasses.replace(settings, rows=0)
