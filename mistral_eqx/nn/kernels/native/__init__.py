"""Kernels in C++ for CPUs, built when the package is installed; where they are missing, XLA computes the same."""

import ctypes
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from ....kernel_library import open_library
from ...precision import to_bits


PANEL = 16
"""How many rows of a weight stand side by side in the layout that the kernels read."""


FEW = 8
"""The most rows of activations, or queries, for which these kernels are faster than XLA's products of matrices."""


@functools.cache
def instructions() -> str | None:
    """The instructions that the kernels use here: `"avx512"`, `"avx2"` or `"neon"`.

    **Returns:** `None` if the kernels were not built, if this processor has none of these, or if the environment
    variable `MISTRAL_EQX_KERNELS` is `off`.
    """
    found = open_library()
    if found is None:
        return None
    library, name = found
    for call in ("linear", "grouped_linear", "dense", "grouped_dense", "attend"):
        call = f"mistral_eqx_{call}"
        jax.ffi.register_ffi_target(call, jax.ffi.pycapsule(getattr(library, call)), platform="cpu")
    return name


def has_slow_products(dtype: jnp.dtype) -> bool:
    """Whether XLA may multiply many rows faster: processors with AVX-512 or NEON may have instructions for bfloat16."""
    return dtype == jnp.bfloat16 and instructions() != "avx2"


def supports(format: str) -> bool:
    """Whether the kernels are there and multiply by blocks of this format."""
    found = open_library()
    return instructions() is not None and found is not None and _has(found[0], format)


@functools.cache
def _has(library: ctypes.CDLL, format: str) -> bool:
    return bool(library.mistral_eqx_has_format(format.encode()))


def arrange(
    rows: UInt8[np.ndarray, "panels _ blocks bytes"], fields: Sequence[int], into: UInt8[np.ndarray, "panels blocks _"]
) -> bool:
    """Puts the blocks of `PANEL` rows side by side, as [`mistral_eqx.quant.to_panels`][] says; other threads go on.

    **Arguments:**

    - `rows`: the blocks of each panel's rows, contiguous.
    - `fields`: the sizes of a block's fields in bytes.
    - `into`: the panels, contiguous.

    **Returns:** whether the kernels are there.
    """
    found = open_library()
    if found is None:
        return False
    panels, _, blocks, nbytes = rows.shape
    sizes = (ctypes.c_int64 * len(fields))(*fields)
    call = found[0].mistral_eqx_arrange
    counts = (ctypes.c_int64(count) for count in (panels, blocks, nbytes))
    if not call(
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_void_p(into.ctypes.data),
        *counts,
        sizes,
        ctypes.c_int64(len(fields)),
    ):
        raise ValueError(f"Fields of {list(fields)} bytes do not make a block of {nbytes}.")
    return True


def linear(
    x: Float[Array, "rows inputs"], panels: Sequence[UInt8[Array, "_ _ _"]], formats: Sequence[str]
) -> list[Float[Array, "rows _"]]:
    """Multiplies activations by weights in panels of quantized blocks, for a program on the CPU.

    For few rows, activations are rounded to two codes of 8 bits, each 32 of a row with a scale of their own, unless the
    format's codes stand for floats or have no scale. For many rows, weights are dequantized piece by piece. Sums are
    float32.

    **Arguments:**

    - `x`: activations in float32.
    - `panels`: of each weight, a block of each of `PANEL` rows side by side, as [`mistral_eqx.quant.to_panels`][]
        arranges them, shape `(panels, blocks, bytes)`.
    - `formats`: the names of the blocks' formats.

    **Returns:** the products with each weight.
    """
    results = [jax.ShapeDtypeStruct((x.shape[0], PANEL * one.shape[0]), jnp.float32) for one in panels]
    call = jax.ffi.ffi_call("mistral_eqx_linear", results, vmap_method="sequential")
    return list(call(x, *panels, formats=" ".join(formats)))


def grouped_linear(
    x: Float[Array, "rows inputs"],
    sizes: Int[Array, "groups"],
    panels: Sequence[UInt8[Array, "groups _ _ _"]],
    formats: Sequence[str],
) -> list[Float[Array, "rows _"]]:
    """Multiplies groups of rows by stacked weights in panels, each group by its own; only these are read, in place.

    **Arguments:**

    - `x`: activations in float32, group after group.
    - `sizes`: the number of rows of each group. The results of rows after the last group are zero.
    - `panels`: of each stack, what `linear` takes for one weight, with a leading axis of groups.
    - `formats`: as for `linear`.

    **Returns:** the products with the weights of each stack.
    """
    results = [jax.ShapeDtypeStruct((x.shape[0], PANEL * one.shape[1]), jnp.float32) for one in panels]
    call = jax.ffi.ffi_call("mistral_eqx_grouped_linear", results, vmap_method="sequential")
    return list(call(x, sizes.astype(jnp.int32), *panels, formats=" ".join(formats)))


def dense(x: Float[Array, "rows inputs"], weight: Float[Array, "outputs inputs"]) -> Float[Array, "rows outputs"]:
    """Multiplies at most `FEW` rows of activations by a weight of floats, for a program on the CPU.

    The weight is read once, where it is, in its own precision; products and sums are float32.

    **Arguments:**

    - `x`: activations in float32.
    - `weight`: float32, bfloat16 or float16.
    """
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("mistral_eqx_dense", result, vmap_method="sequential")(x, weight)


def grouped_dense(
    x: Float[Array, "rows inputs"], sizes: Int[Array, "groups"], weights: Float[Array, "groups outputs inputs"]
) -> Float[Array, "rows outputs"]:
    """Multiplies groups of rows by stacked weights of floats, each group by its own; only these are read, in place.

    **Arguments:**

    - `x`: activations in float32, group after group, any number of rows.
    - `sizes`: the number of rows of each group. The results of rows after the last group are zero.
    - `weights`: float32, bfloat16 or float16.
    """
    result = jax.ShapeDtypeStruct((x.shape[0], weights.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("mistral_eqx_grouped_dense", result, vmap_method="sequential")
    return call(x, sizes.astype(jnp.int32), weights)


def attends(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether the kernels are there and have attention for keys and values of this precision and size."""
    return instructions() is not None and dtype in (jnp.float32, jnp.bfloat16, jnp.float16) and head_dim % 16 == 0


def attend(
    q: Float[Array, "batch seq kv_heads q_per_kv head_dim"],
    k: Num[Array, "batch kv_heads kv_seq head_dim"],
    v: Num[Array, "batch kv_heads kv_seq head_dim"],
    mask: Bool[Array, "batch seq kv_seq"],
    scales: tuple[Float[Array, "batch kv_heads kv_seq"], Float[Array, "batch kv_heads kv_seq"]] | None = None,
    *,
    scale: float,
) -> tuple[Float[Array, "batch seq kv_heads q_per_kv head_dim"], Float[Array, "batch seq kv_heads q_per_kv 1"]]:
    """Attention of few queries, for a program on the CPU; keys and values are read once, where they are.

    **Arguments:**

    - `q`: queries in float32.
    - `k`, `v`: keys and values in a precision that `attends` has; or codes, int8 or the bits of float8 e4m3.
    - `mask`: which keys each query attends to.
    - `scales`: those of the codes of `k` and `v`.
    - `scale`: the factor of the scores.

    **Returns:** as [`mistral_eqx.nn.flash_attention`][] does, in float32.
    """
    results = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((*q.shape[:-1], 1), jnp.float32)
    call = jax.ffi.ffi_call("mistral_eqx_attend", results, vmap_method="sequential")
    # The bits of a cache that is stored as bits are the cache itself; XLA would write it anew as floats.
    stored = (to_bits(k), to_bits(v)) if k.dtype.itemsize == 2 else (k, v)
    precision = "float8" if k.dtype == jnp.uint8 else k.dtype.name
    mixed, log_sum = call(q, *stored, mask, *(scales or ()), scale=np.float32(scale), precision=precision)
    return mixed, log_sum
