from ..nn.layers import (
    AdaptableLayer as AdaptableLayer,
    QuantizableLayer as QuantizableLayer,
    adaptable_layers as adaptable_layers,
    dims_of as dims_of,
    quantizable_layers as quantizable_layers,
)
from .adapt import (
    adapt as adapt,
    apply_lora as apply_lora,
    has_adapters as has_adapters,
    is_adapter as is_adapter,
    merge_lora as merge_lora,
    shapes_of as shapes_of,
)
from .dropout import with_keys as with_keys
from .several import SeveralLoRAWeight as SeveralLoRAWeight, for_rows as for_rows, with_several as with_several
from .weight import LoRAWeight as LoRAWeight, TrainedWeight as TrainedWeight
