from .activations import RoundedActivations as RoundedActivations
from .awq import AWQ as AWQ
from .blocks import (
    BlockWeight as BlockWeight,
    block_dims as block_dims,
    formats as formats,
    merged_sizes as merged_sizes,
)
from .blockwise import AnyScheme as AnyScheme
from .calibration import (
    AbstractCalibratedScheme as AbstractCalibratedScheme,
    Inputs as Inputs,
    checked_calibration as checked_calibration,
)
from .floats import (
    DOUBLE_SIZE as DOUBLE_SIZE,
    DYNAMIC_CODES as DYNAMIC_CODES,
    NF4_CODES as NF4_CODES,
    double_nf4_largest as double_nf4_largest,
    double_nf4_rows as double_nf4_rows,
    nf4_blocks as nf4_blocks,
)
from .ggml import FORMATS as FORMATS
from .gptq import GPTQ as GPTQ
from .integers import integer_blocks as integer_blocks, pack as pack, unpack as unpack
from .layout import BlockFormat as BlockFormat
from .mixtures import MIXTURES as MIXTURES, fitting_type as fitting_type, mixed_type as mixed_type
from .ordered import OrderedWeight as OrderedWeight
from .panels import from_panels as from_panels, to_panels as to_panels
from .recipe import (
    QUANTIZED as QUANTIZED,
    Recipe as Recipe,
    chosen_schemes as chosen_schemes,
    dequantize as dequantize,
    quantize as quantize,
    quantized_shapes as quantized_shapes,
    uncalibrated as uncalibrated,
)
from .scaled import ScaledWeight as ScaledWeight
from .schemes import (
    FP8 as FP8,
    GGUF as GGUF,
    NF4 as NF4,
    RTN as RTN,
    AbstractScheme as AbstractScheme,
    Int8 as Int8,
    Layer as Layer,
)
from .table import block_format as block_format
