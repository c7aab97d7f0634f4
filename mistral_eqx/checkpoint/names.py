"""What each tensor of the model is called in each checkpoint format: the one table."""

import dataclasses
import math
import re
from collections.abc import Iterator

from ..config import MistralConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the model, or one of each block, and its names.

    **Attributes:**

    - `path`: where it stands in the model; `{layer}` is the block's number, in the names too.
    - `out_dims`, `in_dims`: the dimensions of its rows and of its columns. A file stores a matrix with all of
        `out_dims` in one axis and all of `in_dims` in the other, a vector with its one axis.
    - `hf`, `mistral`, `gguf`: its name in each format.
    - `rotary`: whether its rows are turned by the rotary embedding, so that their order within a head matters. The
        model, Mistral and GGUF put the two entries of a pair side by side; Hugging Face puts the first entries of
        all pairs before the second ones.
    """

    path: str
    out_dims: str
    in_dims: str
    hf: str
    mistral: str
    gguf: str
    rotary: bool = False

    def at(self, layer: int) -> "Row":
        """The row of one block."""
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


TABLE: tuple[Row, ...] = (
    Row(
        "embedding.weight.value",
        "vocab",
        "embed",
        hf="model.embed_tokens.weight",
        mistral="tok_embeddings.weight",
        gguf="token_embd.weight",
    ),
    Row(
        "blocks.{layer}.attention_norm.weight",
        "embed",
        "",
        hf="model.layers.{layer}.input_layernorm.weight",
        mistral="layers.{layer}.attention_norm.weight",
        gguf="blk.{layer}.attn_norm.weight",
    ),
    Row(
        "blocks.{layer}.attention.q_proj.weight.value",
        "kv_heads q_per_kv head_dim",
        "embed",
        hf="model.layers.{layer}.self_attn.q_proj.weight",
        mistral="layers.{layer}.attention.wq.weight",
        gguf="blk.{layer}.attn_q.weight",
        rotary=True,
    ),
    Row(
        "blocks.{layer}.attention.k_proj.weight.value",
        "kv_heads head_dim",
        "embed",
        hf="model.layers.{layer}.self_attn.k_proj.weight",
        mistral="layers.{layer}.attention.wk.weight",
        gguf="blk.{layer}.attn_k.weight",
        rotary=True,
    ),
    Row(
        "blocks.{layer}.attention.v_proj.weight.value",
        "kv_heads head_dim",
        "embed",
        hf="model.layers.{layer}.self_attn.v_proj.weight",
        mistral="layers.{layer}.attention.wv.weight",
        gguf="blk.{layer}.attn_v.weight",
    ),
    Row(
        "blocks.{layer}.attention.o_proj.weight.value",
        "embed",
        "kv_heads q_per_kv head_dim",
        hf="model.layers.{layer}.self_attn.o_proj.weight",
        mistral="layers.{layer}.attention.wo.weight",
        gguf="blk.{layer}.attn_output.weight",
    ),
    Row(
        "blocks.{layer}.feed_forward_norm.weight",
        "embed",
        "",
        hf="model.layers.{layer}.post_attention_layernorm.weight",
        mistral="layers.{layer}.ffn_norm.weight",
        gguf="blk.{layer}.ffn_norm.weight",
    ),
    Row(
        "blocks.{layer}.feed_forward.gate_proj.weight.value",
        "hidden",
        "embed",
        hf="model.layers.{layer}.mlp.gate_proj.weight",
        mistral="layers.{layer}.feed_forward.w1.weight",
        gguf="blk.{layer}.ffn_gate.weight",
    ),
    Row(
        "blocks.{layer}.feed_forward.up_proj.weight.value",
        "hidden",
        "embed",
        hf="model.layers.{layer}.mlp.up_proj.weight",
        mistral="layers.{layer}.feed_forward.w3.weight",
        gguf="blk.{layer}.ffn_up.weight",
    ),
    Row(
        "blocks.{layer}.feed_forward.down_proj.weight.value",
        "embed",
        "hidden",
        hf="model.layers.{layer}.mlp.down_proj.weight",
        mistral="layers.{layer}.feed_forward.w2.weight",
        gguf="blk.{layer}.ffn_down.weight",
    ),
    Row(
        "norm.weight",
        "embed",
        "",
        hf="model.norm.weight",
        mistral="norm.weight",
        gguf="output_norm.weight",
    ),
    Row(
        "head.weight.value",
        "vocab",
        "embed",
        hf="lm_head.weight",
        mistral="output.weight",
        gguf="output.weight",
    ),
)

EMBEDDING, HEAD = TABLE[0], TABLE[-1]

# Tables of angles that early files carry along; the model computes them from its config.
_DERIVED = {
    "hf": re.compile(r"(.*\.)?rotary_emb\.inv_freq"),
    "mistral": re.compile(r"rope\.freqs"),
    "gguf": re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?"),
}


def rows(config: MistralConfig) -> Iterator[Row]:
    """The rows of all tensors of a model with this config, in the order in which it applies them."""
    blocks = [row for row in TABLE if "{layer}" in row.path]
    yield EMBEDDING
    for layer in range(config.layers):
        yield from (row.at(layer) for row in blocks)
    yield from (row for row in TABLE if "{layer}" not in row.path and row is not EMBEDDING and row is not HEAD)
    if not config.tied:
        yield HEAD


def is_derived(name: str, format: str) -> bool:
    """Whether a tensor of a file only repeats what the config says."""
    return _DERIVED[format].fullmatch(name) is not None
