"""Mixtures of GGUF's types, such as Q4_K_M: layers that lose more by quantization get more bits.

The choices are those of [llama.cpp](https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp) for dense
models of this architecture without an importance matrix.
"""

from ..config import MistralConfig
from .table import block_format


MIXTURES = {
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
}
"""The mixtures by name, and the type that most weights of each have."""

# For rows that blocks of 256 numbers do not divide: a type that loses no more, in blocks of 32.
_IN_SMALL_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


def mixed_type(mixture: str, path: str, config: MistralConfig) -> str:
    """The type of a layer's weight in a mixture.

    **Arguments:**

    - `mixture`: one of `MIXTURES`.
    - `path`: the layer's path in the model, such as `"blocks.0.attention.q_proj"`.
    - `config`: the model's sizes.
    """
    *block, name = path.split(".")
    columns = _columns(path, config)
    most = MIXTURES[mixture]
    if name == "head" or (name == "embedding" and config.tied):
        wanted = "Q8_0" if columns % block_format(most).size else "Q6_K"
    elif block:
        wanted = _in_block(mixture, name, int(block[1]), config) or most
        # llama.cpp's rule for the 70B model, which it knows by its layers.
        if name == "v_proj" and config.layers == 80 and config.q_per_kv > 1 and wanted in ("Q3_K", "Q4_K"):
            wanted = "Q5_K"
    else:
        wanted = most
    return fitting_type(wanted, columns)


def _columns(path: str, config: MistralConfig) -> int:
    """The inputs of a layer."""
    *block, name = path.split(".")
    if name == "down_proj":
        with_experts = int(block[1]) >= config.dense_layers
        width = "shared_hidden" if "shared" in block else "expert_hidden" if with_experts else ""
        return config.sizes[width] if width else config.hidden
    inputs = {"o_proj": config.q_heads * config.value_dim}
    if config.latent is not None:
        inputs |= {"q_b_proj": config.latent.q_rank, "kv_b_proj": config.latent.kv_rank}
    return inputs.get(name, config.embed)


def fitting_type(kind: str, columns: int) -> str:
    """A type, or if its blocks do not divide rows of so many columns, the next one whose blocks do."""
    for fitting in (kind, _IN_SMALL_BLOCKS.get(kind, kind)):
        if columns % block_format(fitting).size == 0:
            return fitting
    return "F16"


def _in_block(mixture: str, name: str, layer: int, config: MistralConfig) -> str | None:
    """The type of a layer of a block that has not the type of most."""
    layers, grouped = config.layers, config.q_per_kv >= 4
    first_eighth = layer < layers // 8
    more = first_eighth or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    match mixture, name:
        case "Q2_K", "v_proj":
            return "Q4_K" if grouped else "Q3_K"
        case "Q2_K", "o_proj" | "down_proj":
            return "Q3_K"
        case "Q3_K_M", "v_proj":
            return "Q5_K" if layer < 2 else "Q4_K"
        case "Q3_K_M", "down_proj":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case "Q3_K_M", "o_proj":
            return "Q4_K"
        case "Q3_K_L", "v_proj" | "o_proj" | "down_proj":
            return "Q5_K"
        case "Q4_K_S", "v_proj" if layer < 4:
            return "Q5_K"
        case "Q4_K_S", "down_proj" if first_eighth:
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M", "v_proj" | "down_proj" if more:
            return "Q6_K"
        case "IQ4_NL" | "IQ4_XS", "v_proj" if grouped:
            return "Q5_K"
        case "IQ4_NL" | "IQ4_XS", "down_proj" if first_eighth:
            return "Q5_K"
    return None
