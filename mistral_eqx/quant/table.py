"""Every block format, by its name."""

import functools

from .floats import FP8, NVFP4, double_nf4_format, fp8_format, nf4_format
from .ggml import FORMATS
from .integers import INT8, integer_format
from .layout import BlockFormat


_NAMED = {**FORMATS, **{format.name: format for format in (INT8, FP8, NVFP4)}}


@functools.cache
def block_format(name: str) -> BlockFormat:
    """A block format by its name.

    **Arguments:**

    - `name`: a type of GGUF; or `"INT8"`, `"FP8"` or `"NVFP4"`, whose scales belong to the weight; or `"INT4/128"` (2
        to 8 bits), `"NF4/64"` or `"FP8/128"`, with any size of a block; or `"NF4D/4096"`, with the size of a row.
    """
    kind, _, size = name.partition("/")
    if kind == "NF4":
        return nf4_format(int(size))
    if kind == "NF4D":
        return double_nf4_format(int(size))
    if kind == "FP8" and size:
        return fp8_format(int(size))
    if kind.startswith("INT") and size:
        return integer_format(int(kind.removeprefix("INT")), int(size))
    return _NAMED[name]
