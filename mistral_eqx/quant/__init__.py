from .blocks import (
    BlockWeight as BlockWeight,
    block_dims as block_dims,
    formats as formats,
    merged_sizes as merged_sizes,
)
from .ggml import FORMATS as FORMATS, BlockFormat as BlockFormat
from .panels import to_panels as to_panels
