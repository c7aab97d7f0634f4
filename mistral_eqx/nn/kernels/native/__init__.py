"""Kernels in C++ for CPUs, built when the package is installed; where they are missing, XLA computes the same."""

import ctypes
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


LIBRARY = Path(__file__).with_name("_kernels.so")
"""Where the build puts the library."""

PANEL = 16
"""How many rows of a weight stand side by side in the layout that the kernels read."""


@functools.cache
def instructions() -> str | None:
    """The instructions that the kernels use here: `"avx512"`, `"avx2"` or `"neon"`.

    **Returns:** `None` if the kernels were not built, if this processor has none of these, or if the environment
    variable `MISTRAL_EQX_KERNELS` is `off`.
    """
    if os.environ.get("MISTRAL_EQX_KERNELS", "").lower() == "off":
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    library.mistral_eqx_instructions.restype = ctypes.c_char_p
    name = library.mistral_eqx_instructions()
    if name is None:
        return None
    jax.ffi.register_ffi_target("mistral_eqx_linear", jax.ffi.pycapsule(library.mistral_eqx_linear), platform="cpu")
    return name.decode()


def supports(format: str) -> bool:
    """Whether the kernels are there and multiply by blocks of this format."""
    return instructions() is not None and _has(format)


@functools.cache
def _has(format: str) -> bool:
    return bool(ctypes.CDLL(str(LIBRARY)).mistral_eqx_has_format(format.encode()))


def linear(
    x: Float[Array, "rows inputs"], panels: UInt8[Array, "panels blocks bytes"], format: str
) -> Float[Array, "rows outputs"]:
    """Multiplies activations by a weight in panels of quantized blocks, for a program on the CPU.

    Activations are rounded to 8 bits, each 32 of a row with a scale of their own, unless the format is `BF16` or `F16`.
    Sums are float32.

    **Arguments:**

    - `x`: activations in float32.
    - `panels`: a block of each of `PANEL` rows side by side, as [`mistral_eqx.quant.to_panels`][] arranges them.
    - `format`: the name of the blocks' format.
    """
    result = jax.ShapeDtypeStruct((x.shape[0], PANEL * panels.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("mistral_eqx_linear", result, vmap_method="sequential")(x, panels, format=format)
