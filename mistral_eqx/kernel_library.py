"""Opens the library of the C++ kernels, without JAX: the command line tells which instructions it has."""

import ctypes
import functools
import os
from pathlib import Path


LIBRARY = Path(__file__).with_name("nn") / "kernels/native/_kernels.so"
"""Where the build puts the library."""


@functools.cache
def open_library() -> tuple[ctypes.CDLL, str] | None:
    """The library, and the instructions that it uses here: `"avx512"`, `"avx2"` or `"neon"`.

    **Returns:** `None` if it was not built, if this processor has none of these, or if the environment variable
    `MISTRAL_EQX_KERNELS` is `off`.
    """
    if os.environ.get("MISTRAL_EQX_KERNELS", "").lower() == "off":
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    library.mistral_eqx_instructions.restype = ctypes.c_char_p
    name = library.mistral_eqx_instructions()
    return None if name is None else (library, name.decode())
