"""The name of each layer of the model in each checkpoint format: the one table."""

import dataclasses
import math
import re
from collections.abc import Iterator

from ..config import MistralConfig


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A layer of the model, or of each of its blocks: the dimensions of its weight, and its name in each format.

    **Attributes:**

    - `path`: the path of the layer in the model; `{layer}` is the block's index, here and in the names.
    - `out_dims`, `in_dims`: the dimensions of its weight's rows and columns. A file stores a matrix with two axes,
        `out_dims` and `in_dims`, and a vector with one.
    - `hf`, `mistral`, `gguf`: its name in each format. `*` stands for the index of an expert, where a format stores a
        tensor for each expert: one after the other, they are the rows of the weight.
    - `of`: what a layer with this weight has: `"grouped"` or `"latent"` attention, a `"dense"` feed-forward layer or
        `"experts"`, and `"shared"` experts.
    - `width`: the size that `hidden` has in this weight, as the config's `sizes` name it.
    - `rotary`: whether the rotary embedding acts on the weight's rows, so that their order within a head matters. The
        model, Mistral and GGUF put the two entries of a pair side by side; Hugging Face puts the first entries of
        all pairs before the second entries.
    """

    path: str
    out_dims: str
    in_dims: str
    hf: str
    mistral: str
    gguf: str
    of: str = ""
    width: str = "hidden"
    rotary: bool = False

    def at(self, layer: int) -> "LayerSpec":
        """The spec for one block."""
        names = {field: getattr(self, field).format(layer=layer) for field in ("path", "hf", "mistral", "gguf")}
        return dataclasses.replace(self, **names)

    def name(self, format: str) -> str:
        """The name of the tensor that holds the layer's weight in `"hf"`, `"mistral"` or `"gguf"`."""
        return {"hf": self.hf, "mistral": self.mistral, "gguf": self.gguf}[format] + ".weight"

    def names(self, config: MistralConfig, format: str) -> list[str]:
        """The names of the tensors that hold the weight's rows, in order: one, or one for each expert."""
        name = self.name(format)
        return [name.replace("*", str(expert)) for expert in range(config.experts)] if "*" in name else [name]

    def belongs(self, config: MistralConfig, layer: int) -> bool:
        """Whether a block of a model with this config has the weight."""
        found = {
            "grouped" if config.latent is None else "latent",
            "experts" if layer >= config.dense_layers else "dense",
        }
        found |= {"shared"} if config.routing is not None and config.routing.shared else set()
        return set(self.of.split()) <= found

    @property
    def dims(self) -> str:
        """The weight's dimensions in the model, in order."""
        return f"{self.out_dims} {self.in_dims}".strip()

    def shape(self, config: MistralConfig) -> tuple[int, ...]:
        """The weight's shape in the model."""
        return self.sizes(config, self.dims)

    def file_shape(self, config: MistralConfig) -> tuple[int, ...]:
        """The weight's shape in a file."""
        return tuple(math.prod(self.sizes(config, dims)) for dims in (self.out_dims, self.in_dims) if dims)

    def sizes(self, config: MistralConfig, dims: str) -> tuple[int, ...]:
        """The sizes of some of the weight's dimensions."""
        return tuple(config.sizes[self.width if dim == "hidden" else dim] for dim in dims.split())


TABLE: tuple[LayerSpec, ...] = (
    LayerSpec(
        "embedding",
        "vocab",
        "embed",
        hf="model.embed_tokens",
        mistral="tok_embeddings",
        gguf="token_embd",
    ),
    LayerSpec(
        "blocks.{layer}.attention_norm",
        "embed",
        "",
        hf="model.layers.{layer}.input_layernorm",
        mistral="layers.{layer}.attention_norm",
        gguf="blk.{layer}.attn_norm",
    ),
    LayerSpec(
        "blocks.{layer}.attention.q_proj",
        "kv_heads q_per_kv head_dim",
        "embed",
        hf="model.layers.{layer}.self_attn.q_proj",
        mistral="layers.{layer}.attention.wq",
        gguf="blk.{layer}.attn_q",
        of="grouped",
        rotary=True,
    ),
    LayerSpec(
        "blocks.{layer}.attention.k_proj",
        "kv_heads head_dim",
        "embed",
        hf="model.layers.{layer}.self_attn.k_proj",
        mistral="layers.{layer}.attention.wk",
        gguf="blk.{layer}.attn_k",
        of="grouped",
        rotary=True,
    ),
    LayerSpec(
        "blocks.{layer}.attention.v_proj",
        "kv_heads head_dim",
        "embed",
        hf="model.layers.{layer}.self_attn.v_proj",
        mistral="layers.{layer}.attention.wv",
        gguf="blk.{layer}.attn_v",
        of="grouped",
    ),
    LayerSpec(
        "blocks.{layer}.attention.o_proj",
        "embed",
        "kv_heads q_per_kv head_dim",
        hf="model.layers.{layer}.self_attn.o_proj",
        mistral="layers.{layer}.attention.wo",
        gguf="blk.{layer}.attn_output",
        of="grouped",
    ),
    LayerSpec(
        "blocks.{layer}.attention.q_a_proj",
        "q_rank",
        "embed",
        hf="model.layers.{layer}.self_attn.q_a_proj",
        mistral="layers.{layer}.attention.wq_a",
        gguf="blk.{layer}.attn_q_a",
        of="latent",
    ),
    LayerSpec(
        "blocks.{layer}.attention.q_a_norm",
        "q_rank",
        "",
        hf="model.layers.{layer}.self_attn.q_a_layernorm",
        mistral="layers.{layer}.attention.q_a_norm",
        gguf="blk.{layer}.attn_q_a_norm",
        of="latent",
    ),
    LayerSpec(
        "blocks.{layer}.attention.q_b_proj",
        "kv_heads head_dim",
        "q_rank",
        hf="model.layers.{layer}.self_attn.q_b_proj",
        mistral="layers.{layer}.attention.wq_b",
        gguf="blk.{layer}.attn_q_b",
        of="latent",
    ),
    LayerSpec(
        "blocks.{layer}.attention.kv_a_proj",
        "cached",
        "embed",
        hf="model.layers.{layer}.self_attn.kv_a_proj_with_mqa",
        mistral="layers.{layer}.attention.wkv_a_with_mqa",
        gguf="blk.{layer}.attn_kv_a_mqa",
        of="latent",
    ),
    LayerSpec(
        "blocks.{layer}.attention.kv_a_norm",
        "kv_rank",
        "",
        hf="model.layers.{layer}.self_attn.kv_a_layernorm",
        mistral="layers.{layer}.attention.kv_a_norm",
        gguf="blk.{layer}.attn_kv_a_norm",
        of="latent",
    ),
    LayerSpec(
        "blocks.{layer}.attention.kv_b_proj",
        "kv_heads expanded",
        "kv_rank",
        hf="model.layers.{layer}.self_attn.kv_b_proj",
        mistral="layers.{layer}.attention.wkv_b",
        gguf="blk.{layer}.attn_kv_b",
        of="latent",
    ),
    LayerSpec(
        "blocks.{layer}.attention.o_proj",
        "embed",
        "kv_heads value_dim",
        hf="model.layers.{layer}.self_attn.o_proj",
        mistral="layers.{layer}.attention.wo",
        gguf="blk.{layer}.attn_output",
        of="latent",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward_norm",
        "embed",
        "",
        hf="model.layers.{layer}.post_attention_layernorm",
        mistral="layers.{layer}.ffn_norm",
        gguf="blk.{layer}.ffn_norm",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.gate_proj",
        "hidden",
        "embed",
        hf="model.layers.{layer}.mlp.gate_proj",
        mistral="layers.{layer}.feed_forward.w1",
        gguf="blk.{layer}.ffn_gate",
        of="dense",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.up_proj",
        "hidden",
        "embed",
        hf="model.layers.{layer}.mlp.up_proj",
        mistral="layers.{layer}.feed_forward.w3",
        gguf="blk.{layer}.ffn_up",
        of="dense",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.down_proj",
        "embed",
        "hidden",
        hf="model.layers.{layer}.mlp.down_proj",
        mistral="layers.{layer}.feed_forward.w2",
        gguf="blk.{layer}.ffn_down",
        of="dense",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.router",
        "routes",
        "embed",
        hf="model.layers.{layer}.block_sparse_moe.gate",
        mistral="layers.{layer}.feed_forward.gate",
        gguf="blk.{layer}.ffn_gate_inp",
        of="grouped experts",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.gate_proj",
        "experts hidden",
        "embed",
        hf="model.layers.{layer}.block_sparse_moe.experts.*.w1",
        mistral="layers.{layer}.feed_forward.experts.*.w1",
        gguf="blk.{layer}.ffn_gate_exps",
        of="grouped experts",
        width="expert_hidden",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.up_proj",
        "experts hidden",
        "embed",
        hf="model.layers.{layer}.block_sparse_moe.experts.*.w3",
        mistral="layers.{layer}.feed_forward.experts.*.w3",
        gguf="blk.{layer}.ffn_up_exps",
        of="grouped experts",
        width="expert_hidden",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.down_proj",
        "experts embed",
        "hidden",
        hf="model.layers.{layer}.block_sparse_moe.experts.*.w2",
        mistral="layers.{layer}.feed_forward.experts.*.w2",
        gguf="blk.{layer}.ffn_down_exps",
        of="grouped experts",
        width="expert_hidden",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.router",
        "routes",
        "embed",
        hf="model.layers.{layer}.mlp.gate",
        mistral="layers.{layer}.gate",
        gguf="blk.{layer}.ffn_gate_inp",
        of="latent experts",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.gate_proj",
        "experts hidden",
        "embed",
        hf="model.layers.{layer}.mlp.experts.*.gate_proj",
        mistral="layers.{layer}.experts.*.w1",
        gguf="blk.{layer}.ffn_gate_exps",
        of="latent experts",
        width="expert_hidden",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.up_proj",
        "experts hidden",
        "embed",
        hf="model.layers.{layer}.mlp.experts.*.up_proj",
        mistral="layers.{layer}.experts.*.w3",
        gguf="blk.{layer}.ffn_up_exps",
        of="latent experts",
        width="expert_hidden",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.down_proj",
        "experts embed",
        "hidden",
        hf="model.layers.{layer}.mlp.experts.*.down_proj",
        mistral="layers.{layer}.experts.*.w2",
        gguf="blk.{layer}.ffn_down_exps",
        of="latent experts",
        width="expert_hidden",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.shared.gate_proj",
        "hidden",
        "embed",
        hf="model.layers.{layer}.mlp.shared_experts.gate_proj",
        mistral="layers.{layer}.shared_experts.w1",
        gguf="blk.{layer}.ffn_gate_shexp",
        of="latent experts shared",
        width="shared_hidden",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.shared.up_proj",
        "hidden",
        "embed",
        hf="model.layers.{layer}.mlp.shared_experts.up_proj",
        mistral="layers.{layer}.shared_experts.w3",
        gguf="blk.{layer}.ffn_up_shexp",
        of="latent experts shared",
        width="shared_hidden",
    ),
    LayerSpec(
        "blocks.{layer}.feed_forward.shared.down_proj",
        "embed",
        "hidden",
        hf="model.layers.{layer}.mlp.shared_experts.down_proj",
        mistral="layers.{layer}.shared_experts.w2",
        gguf="blk.{layer}.ffn_down_shexp",
        of="latent experts shared",
        width="shared_hidden",
    ),
    LayerSpec(
        "norm",
        "embed",
        "",
        hf="model.norm",
        mistral="norm",
        gguf="output_norm",
    ),
    LayerSpec(
        "head",
        "vocab",
        "embed",
        hf="lm_head",
        mistral="output",
        gguf="output",
    ),
)

EMBEDDING, HEAD = TABLE[0], TABLE[-1]

# Early files also store the table of rotary angles, which the model computes from its config.
_DERIVED = {
    "hf": re.compile(r"(.*\.)?rotary_emb\.inv_freq"),
    "mistral": re.compile(r"rope\.freqs"),
    "gguf": re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?|rope_freqs\.weight"),
}


def layer_specs(config: MistralConfig) -> Iterator[LayerSpec]:
    """The specs of all layers of a model with this config, in the order in which the model applies them."""
    blocks = [spec for spec in TABLE if "{layer}" in spec.path]
    yield EMBEDDING
    for layer in range(config.layers):
        yield from (spec.at(layer) for spec in blocks if spec.belongs(config, layer))
    yield from (spec for spec in TABLE if "{layer}" not in spec.path and spec is not EMBEDDING and spec is not HEAD)
    if not config.tied:
        yield HEAD


def is_derived(name: str, format: str) -> bool:
    """Whether a tensor of a file can be computed from the config, so that no reader needs it."""
    return _DERIVED[format].fullmatch(name) is not None
