"""The name of each tensor of the model in each checkpoint format: the one table."""

import dataclasses
import math
import re
from collections.abc import Iterator

from ..config import MistralConfig


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor of the model, or of each of its blocks: its dimensions and its name in each format.

    **Attributes:**

    - `path`: the path of the tensor in the model; `{layer}` is the block's index, here and in the names.
    - `out_dims`, `in_dims`: the dimensions of its rows and of its columns. A file stores a matrix with two axes,
        `out_dims` and `in_dims`, and a vector with one.
    - `hf`, `mistral`, `gguf`: its name in each format.
    - `rotary`: whether the rotary embedding acts on its rows, so that their order within a head matters. The
        model, Mistral and GGUF put the two entries of a pair side by side; Hugging Face puts the first entries of
        all pairs before the second entries.
    """

    path: str
    out_dims: str
    in_dims: str
    hf: str
    mistral: str
    gguf: str
    rotary: bool = False

    def at(self, layer: int) -> "TensorSpec":
        """The spec for one block."""
        names = {field: getattr(self, field).format(layer=layer) for field in ("path", "hf", "mistral", "gguf")}
        return dataclasses.replace(self, **names)

    def name(self, format: str) -> str:
        """The tensor's name in `"hf"`, `"mistral"` or `"gguf"`."""
        return {"hf": self.hf, "mistral": self.mistral, "gguf": self.gguf}[format]

    @property
    def dims(self) -> str:
        """The tensor's dimensions in the model, in order."""
        return f"{self.out_dims} {self.in_dims}".strip()

    def shape(self, config: MistralConfig) -> tuple[int, ...]:
        """The tensor's shape in the model."""
        return tuple(getattr(config, dim) for dim in self.dims.split())

    def file_shape(self, config: MistralConfig) -> tuple[int, ...]:
        """The tensor's shape in a file."""
        return tuple(
            math.prod(getattr(config, dim) for dim in dims.split()) for dims in (self.out_dims, self.in_dims) if dims
        )


TABLE: tuple[TensorSpec, ...] = (
    TensorSpec(
        "embedding.weight.value",
        "vocab",
        "embed",
        hf="model.embed_tokens.weight",
        mistral="tok_embeddings.weight",
        gguf="token_embd.weight",
    ),
    TensorSpec(
        "blocks.{layer}.attention_norm.weight",
        "embed",
        "",
        hf="model.layers.{layer}.input_layernorm.weight",
        mistral="layers.{layer}.attention_norm.weight",
        gguf="blk.{layer}.attn_norm.weight",
    ),
    TensorSpec(
        "blocks.{layer}.attention.q_proj.weight.value",
        "kv_heads q_per_kv head_dim",
        "embed",
        hf="model.layers.{layer}.self_attn.q_proj.weight",
        mistral="layers.{layer}.attention.wq.weight",
        gguf="blk.{layer}.attn_q.weight",
        rotary=True,
    ),
    TensorSpec(
        "blocks.{layer}.attention.k_proj.weight.value",
        "kv_heads head_dim",
        "embed",
        hf="model.layers.{layer}.self_attn.k_proj.weight",
        mistral="layers.{layer}.attention.wk.weight",
        gguf="blk.{layer}.attn_k.weight",
        rotary=True,
    ),
    TensorSpec(
        "blocks.{layer}.attention.v_proj.weight.value",
        "kv_heads head_dim",
        "embed",
        hf="model.layers.{layer}.self_attn.v_proj.weight",
        mistral="layers.{layer}.attention.wv.weight",
        gguf="blk.{layer}.attn_v.weight",
    ),
    TensorSpec(
        "blocks.{layer}.attention.o_proj.weight.value",
        "embed",
        "kv_heads q_per_kv head_dim",
        hf="model.layers.{layer}.self_attn.o_proj.weight",
        mistral="layers.{layer}.attention.wo.weight",
        gguf="blk.{layer}.attn_output.weight",
    ),
    TensorSpec(
        "blocks.{layer}.feed_forward_norm.weight",
        "embed",
        "",
        hf="model.layers.{layer}.post_attention_layernorm.weight",
        mistral="layers.{layer}.ffn_norm.weight",
        gguf="blk.{layer}.ffn_norm.weight",
    ),
    TensorSpec(
        "blocks.{layer}.feed_forward.gate_proj.weight.value",
        "hidden",
        "embed",
        hf="model.layers.{layer}.mlp.gate_proj.weight",
        mistral="layers.{layer}.feed_forward.w1.weight",
        gguf="blk.{layer}.ffn_gate.weight",
    ),
    TensorSpec(
        "blocks.{layer}.feed_forward.up_proj.weight.value",
        "hidden",
        "embed",
        hf="model.layers.{layer}.mlp.up_proj.weight",
        mistral="layers.{layer}.feed_forward.w3.weight",
        gguf="blk.{layer}.ffn_up.weight",
    ),
    TensorSpec(
        "blocks.{layer}.feed_forward.down_proj.weight.value",
        "embed",
        "hidden",
        hf="model.layers.{layer}.mlp.down_proj.weight",
        mistral="layers.{layer}.feed_forward.w2.weight",
        gguf="blk.{layer}.ffn_down.weight",
    ),
    TensorSpec(
        "norm.weight",
        "embed",
        "",
        hf="model.norm.weight",
        mistral="norm.weight",
        gguf="output_norm.weight",
    ),
    TensorSpec(
        "head.weight.value",
        "vocab",
        "embed",
        hf="lm_head.weight",
        mistral="output.weight",
        gguf="output.weight",
    ),
)

EMBEDDING, HEAD = TABLE[0], TABLE[-1]

# Early files also store the table of rotary angles, which the model computes from its config.
_DERIVED = {
    "hf": re.compile(r"(.*\.)?rotary_emb\.inv_freq"),
    "mistral": re.compile(r"rope\.freqs"),
    "gguf": re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?"),
}


def tensor_specs(config: MistralConfig) -> Iterator[TensorSpec]:
    """The specs of all tensors of a model with this config, in the order in which the model applies them."""
    blocks = [spec for spec in TABLE if "{layer}" in spec.path]
    yield EMBEDDING
    for layer in range(config.layers):
        yield from (spec.at(layer) for spec in blocks)
    yield from (spec for spec in TABLE if "{layer}" not in spec.path and spec is not EMBEDDING and spec is not HEAD)
    if not config.tied:
        yield HEAD


def is_derived(name: str, format: str) -> bool:
    """Whether a tensor of a file can be computed from the config, so that no reader needs it."""
    return _DERIVED[format].fullmatch(name) is not None
