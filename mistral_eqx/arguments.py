"""Arguments that are JAX's: keys and precisions."""

from typing import Any

import jax
import jax.numpy as jnp

from .documents import shown
from .errors import InputError


def check_key(key: Any, name: str = "key"):
    """Refuses what is no key of random numbers, of the new kind or the old.

    **Raises:** `InputError` that names the argument.
    """
    is_new = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0
    is_old = isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1
    if not is_new and not is_old:
        raise InputError(
            f"{name} is {shown(key)}; it must be one key that jax.random.key made, such as jax.random.key(0).", key=name
        )


def float_dtype(dtype: Any, name: str = "dtype") -> jnp.dtype:
    """The precision that a name or a type stands for.

    **Raises:** `InputError` that names the argument, if it is none of floats.
    """
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if dtype is None or found is None or not jnp.issubdtype(found, jnp.floating):
        raise InputError(
            f"{name} is {shown(dtype)}; it must be a precision of floats, such as 'float32' or 'bfloat16'.", key=name
        )
    return found
