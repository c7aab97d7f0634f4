"""The sizes and constants of a model, and how each checkpoint format writes them down."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MistralConfig:
    """Everything that tells one dense Mistral-family model from another.

    **Attributes:**

    - `vocab`, `embed`, `hidden`, `layers`: tokens in the vocabulary, width of the residual stream, width of the
        feed-forward layer, number of blocks.
    - `kv_heads`, `q_per_kv`, `head_dim`: key/value heads, query heads that share each of them, entries per head.
    - `rope_theta`: the base of the rotary embedding's wavelengths.
    - `norm_eps`: the constant in the denominator of RMSNorm.
    - `max_positions`: the longest context, in tokens.
    - `windows`: for each layer, how many positions a query sees, itself included, or `None` for all before it.
    - `tied`: whether the output head is the embedding table.
    - `bos_id`, `eos_ids`: the token that starts a text, if any, and those that end one.
    """

    vocab: int
    embed: int
    hidden: int
    layers: int
    kv_heads: int
    q_per_kv: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    windows: tuple[int | None, ...]
    tied: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
