from .blocks import BlockWeight as BlockWeight, merged_sizes as merged_sizes
from .ggml import FORMATS as FORMATS, BlockFormat as BlockFormat
