"""The sizes and constants of a model, and how each checkpoint format writes them down."""

import dataclasses
import struct
from collections.abc import Mapping
from typing import Any

from .errors import InputError


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

    **Raises:** `ValueError` if a size is not positive, `head_dim` is odd (a rotary pair would be missing its second
    entry), or `windows` does not have one entry a layer.
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

    def __post_init__(self):
        sizes = ("vocab", "embed", "hidden", "layers", "kv_heads", "q_per_kv", "head_dim", "max_positions")
        for name in (*sizes, "rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"The config's {name} is {value}, but it must be positive.")
        if self.head_dim % 2:
            raise InputError(
                f"The config's head_dim is {self.head_dim}, but it must be even: the rotary embedding turns pairs."
            )
        if len(self.windows) != self.layers:
            raise InputError(
                f"The config has {len(self.windows)} windows for {self.layers} layers; give one entry a layer, "
                "None where a layer sees all positions."
            )
        for window in self.windows:
            if window is not None and window < 1:
                raise InputError(
                    f"The config has a window of {window}, but a query sees at least itself: give 1 or more, or None."
                )

    @property
    def q_heads(self) -> int:
        """The number of query heads."""
        return self.kv_heads * self.q_per_kv

    @property
    def parameters(self) -> int:
        """The number of weights of the model; a tied head is counted once, with the embedding."""
        attention = 2 * self.embed * self.head_dim * (self.q_heads + self.kv_heads)
        block = attention + 3 * self.embed * self.hidden + 2 * self.embed
        tables = 1 if self.tied else 2
        return tables * self.vocab * self.embed + self.layers * block + self.embed

    @classmethod
    def from_hf(cls, settings: Mapping[str, Any]) -> "MistralConfig":
        """Reads a Hugging Face `config.json` of model type `mistral`, `ministral` or `llama`.

        A key that is absent has the default of that model type in transformers: a `mistral` without the key
        `sliding_window` has a window of 4096, one with `"sliding_window": null` has none.

        **Arguments:**

        - `settings`: the parsed JSON object.

        **Returns:** the config.

        **Raises:** `ValueError` that names the key, if one is missing, contradicts another, or asks for a computation
        that this package does not do.
        """
        document = _Document(settings, "config.json")
        model_type = document.take("model_type", None)
        if model_type not in _HF_DEFAULTS:
            raise InputError(
                f"config.json has model_type {model_type!r}, which is not supported; the supported ones are "
                f"{_listed(_HF_DEFAULTS)}."
            )
        for architecture in document.take("architectures", None) or ():
            if architecture not in _HF_ARCHITECTURES:
                raise InputError(
                    f"config.json names the architecture {architecture!r}, which is not supported; the supported "
                    f"ones are {_listed(_HF_ARCHITECTURES)}."
                )
        defaults = _HF_DEFAULTS[model_type]
        embed = document.integer("hidden_size", 4096)
        layers = document.integer("num_hidden_layers", 32)
        heads = document.integer("num_attention_heads", 32)
        kv_heads = document.optional_integer("num_key_value_heads", defaults["num_key_value_heads"]) or heads
        head_dim = document.optional_integer("head_dim", None) or _per_head(embed, heads, "config.json")
        document.expect("hidden_act", ("silu", "swish"), "silu")
        document.expect("partial_rotary_factor", (1.0, None), None)
        document.expect("is_causal", (True, None), None)
        config = cls(
            vocab=document.integer("vocab_size", 32000),
            embed=embed,
            hidden=document.integer("intermediate_size", defaults["intermediate_size"]),
            layers=layers,
            kv_heads=kv_heads,
            q_per_kv=_per_kv(heads, kv_heads, "config.json"),
            head_dim=head_dim,
            rope_theta=_hf_rope_theta(document),
            norm_eps=document.number("rms_norm_eps", 1e-6),
            max_positions=document.integer("max_position_embeddings", defaults["max_position_embeddings"]),
            windows=_hf_windows(document, layers, defaults["sliding_window"]),
            tied=document.flag("tie_word_embeddings", False),
            bos_id=document.optional_integer("bos_token_id", 1),
            eos_ids=document.integers("eos_token_id", (2,)),
        )
        document.refuse_rest(_HF_WITHOUT_EFFECT)
        return config

    def to_hf(self) -> dict[str, Any]:
        """Writes a Hugging Face `config.json`.

        **Returns:** the JSON object, of model type `mistral`, or `ministral` where windows differ from layer to layer.
        The rope base stands in it twice, as `rope_theta` for transformers 4 and in `rope_parameters` for transformers
        5: either of them would otherwise fall back on its default without a word.

        **Raises:** `ValueError` if layers have windows of several sizes, for which that format has no place.
        """
        sizes = {window for window in self.windows if window is not None}
        if len(sizes) > 1:
            raise InputError(
                f"The layers have windows of {_listed(sorted(sizes))} positions, but config.json has a place for one "
                "size only; use the format 'mistral'."
            )
        alternating = None in self.windows and bool(sizes)
        settings: dict[str, Any] = {
            "architectures": ["MinistralForCausalLM" if alternating else "MistralForCausalLM"],
            "model_type": "ministral" if alternating else "mistral",
            "vocab_size": self.vocab,
            "hidden_size": self.embed,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_positions,
            "sliding_window": next(iter(sizes), None),
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
        }
        if alternating:
            settings["layer_types"] = [
                "full_attention" if window is None else "sliding_attention" for window in self.windows
            ]
        return settings

    @classmethod
    def from_params_json(cls, settings: Mapping[str, Any]) -> "MistralConfig":
        """Reads the `params.json` of a Mistral release.

        Releases that do not tell the longest context get 32768 positions, and those that do not tell the rope base
        10000, as in Mistral's own code. The tokens that start and end a text are 1 and 2, as in all its tokenizers,
        unless the file was written by `to_params_json` and says otherwise.

        **Arguments:**

        - `settings`: the parsed JSON object.

        **Returns:** the config.

        **Raises:** `ValueError` that names the key, if one is missing, contradicts another, or asks for a computation
        that this package does not do.
        """
        document = _Document(settings, "params.json")
        document.expect("model_type", ("transformer", None), None)
        document.expect("activation", ("silu", None), None)
        document.expect("causal", (True, None), None)
        layers = document.integer("n_layers")
        heads = document.integer("n_heads")
        kv_heads = document.integer("n_kv_heads")
        config = cls(
            vocab=document.integer("vocab_size"),
            embed=document.integer("dim"),
            hidden=document.integer("hidden_dim"),
            layers=layers,
            kv_heads=kv_heads,
            q_per_kv=_per_kv(heads, kv_heads, "params.json"),
            head_dim=document.integer("head_dim"),
            rope_theta=document.optional_number("rope_theta", None) or 10000.0,
            norm_eps=document.number("norm_eps"),
            max_positions=_agreed(
                {key: document.optional_integer(key, None) for key in ("max_position_embeddings", "max_seq_len")},
                "params.json",
                32768,
            ),
            windows=_mistral_windows(document, layers),
            tied=document.flag("tied_embeddings", False),
            bos_id=document.optional_integer("bos_id", 1),
            eos_ids=document.integers("eos_ids", (2,)),
        )
        document.refuse_rest(_MISTRAL_WITHOUT_EFFECT)
        return config

    def to_params_json(self) -> dict[str, Any]:
        """Writes the `params.json` of a Mistral release.

        **Returns:** the JSON object. Windows that differ by layer are written as the shortest list that, repeated,
        gives them all. The tokens that start and end a text are written only if they are not Mistral's own.
        """
        settings: dict[str, Any] = {
            "dim": self.embed,
            "n_layers": self.layers,
            "head_dim": self.head_dim,
            "hidden_dim": self.hidden,
            "n_heads": self.q_heads,
            "n_kv_heads": self.kv_heads,
            "norm_eps": self.norm_eps,
            "vocab_size": self.vocab,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_positions,
        }
        pattern = next(
            self.windows[:period]
            for period in range(1, self.layers + 1)
            if self.layers % period == 0 and self.windows[:period] * (self.layers // period) == self.windows
        )
        if pattern != (None,):
            settings["sliding_window"] = pattern[0] if len(pattern) == 1 else list(pattern)
        if self.tied:
            settings["tied_embeddings"] = True
        if self.bos_id != 1:
            settings["bos_id"] = self.bos_id
        if self.eos_ids != (2,):
            settings["eos_ids"] = list(self.eos_ids)
        return settings

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, tied: bool = False) -> "MistralConfig":
        """Reads the metadata of a GGUF file of architecture `llama`, which is what llama.cpp calls Mistral's too.

        **Arguments:**

        - `metadata`: the file's keys and values; arrays need a length only.
        - `tied`: whether the head is the embedding table, which no key tells: it is so if the file holds no tensor
            `output.weight`.

        **Returns:** the config. A file that does not tell a window has none, and one that does not tell the rope base
        has 10000, as in llama.cpp.

        **Raises:** `ValueError` that names the key, if one is missing, or asks for a computation that this package
        does not do.
        """
        document = _Document(metadata, "The GGUF metadata")
        document.expect("general.architecture", ("llama",), None)
        document.expect("general.type", ("model", None), None)
        parts = document.optional_integer("split.count", None) or 1
        if parts > 1:
            raise InputError(
                f"The GGUF file is one of {parts} parts; put them together first, with llama.cpp's "
                "llama-gguf-split --merge."
            )
        document.expect("llama.rope.scaling.type", ("none", None), None)
        document.expect("llama.rope.scaling.factor", (0.0, 1.0, None), None)
        document.expect("llama.attention.causal", (True, None), None)
        layers = document.integer("llama.block_count")
        embed = document.integer("llama.embedding_length")
        heads = document.integer("llama.attention.head_count")
        kv_heads = document.integer("llama.attention.head_count_kv", heads)
        head_dim = document.integer(
            "llama.attention.key_length", embed // heads if heads > 0 and embed % heads == 0 else None
        )
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            document.expect(key, (head_dim,), head_dim)
        tokens = document.take("tokenizer.ggml.tokens", None)
        vocab = document.integer("llama.vocab_size", None if tokens is None else len(tokens))
        window = document.optional_integer("llama.attention.sliding_window", None)
        eos_ids = [document.optional_integer(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot", "eom")]
        named = ends_by_name(tokens, document.optional_integer("tokenizer.ggml.unknown_token_id", None))
        eos_ids += [id for id in named if id < vocab]
        config = cls(
            vocab=vocab,
            embed=embed,
            hidden=document.integer("llama.feed_forward_length"),
            layers=layers,
            kv_heads=kv_heads,
            q_per_kv=_per_kv(heads, kv_heads, "The GGUF metadata"),
            head_dim=head_dim,
            rope_theta=_shortest(document.number("llama.rope.freq_base", 10000.0)),
            norm_eps=_shortest(document.number("llama.attention.layer_norm_rms_epsilon")),
            max_positions=document.integer("llama.context_length"),
            windows=(window or None,) * layers,
            tied=tied,
            bos_id=document.optional_integer("tokenizer.ggml.bos_token_id", None),
            eos_ids=tuple(dict.fromkeys(token for token in eos_ids if token is not None)),
        )
        document.refuse_rest(_GGUF_WITHOUT_EFFECT, prefix="llama.")
        return config


# Names by which llama.cpp knows the end of a text, a turn or a message, whatever a file says of these tokens.
_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
)


def ends_by_name(tokens: Any, unknown: int | None) -> list[int]:
    """The ids of a GGUF file's tokens whose name says that they end a text, a turn or a message, as llama.cpp has it.

    **Arguments:**

    - `tokens`: the vocabulary, in the order of its ids.
    - `unknown`: the token that the file uses for unknown words, which ends nothing.
    """
    names = tokens if isinstance(tokens, list) else []
    ids = {name: id for id, name in enumerate(names) if isinstance(name, str) and name in _ENDS and id != unknown}
    # Formats with channels and tools have one of these within a turn.
    calls = {"<|call|>", "<|calls|>"} & ids.keys()
    if calls and ("<|flush|>" in ids or {"<|return|>", "<|call|>"} <= ids.keys()):
        ids.pop("<|end|>", None)
    if "<|tool_response>" in ids:
        ids.pop("</s>", None)
    return sorted(ids.values())


_HF_ARCHITECTURES = ("MistralForCausalLM", "MinistralForCausalLM", "LlamaForCausalLM")

# What transformers takes for a key that is absent, where its model types differ.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "llama": {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
}
_HF_DEFAULTS["ministral"] = _HF_DEFAULTS["mistral"]

# Keys that do not reach the logits of a plain forward pass: file-keeping, training, sampling, outputs.
_HF_WITHOUT_EFFECT = frozenset(
    """
    transformers_version transformers.js_config torch_dtype dtype use_cache initializer_range attention_dropout
    pretraining_tp pad_token_id sep_token_id unk_token_id decoder_start_token_id id2label label2id num_labels
    problem_type return_dict return_dict_in_generate output_attentions output_hidden_states output_scores
    output_router_logits chunk_size_feed_forward is_decoder is_llama_config model_max_length tokenizer_class
    prefix finetuning_task task_specific_params bos_token eos_token pad_token license max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_fixed unsloth_version
    """.split()  # noqa: SIM905
)
_MISTRAL_WITHOUT_EFFECT = frozenset({"max_batch_size"})
# `rope.scaling.*` without a type, or with the type "none", scales nothing.
_GGUF_WITHOUT_EFFECT = frozenset({"llama.tensor_data_layout", "llama.rope.scaling.finetuned"})

_REQUIRED: Any = object()


class _Document:
    """Settings that are taken key by key, so that what nobody took can be refused."""

    def __init__(self, settings: Mapping[str, Any], name: str):
        self._settings = settings
        self._name = name
        self._taken: set[str] = set()

    def take(self, key: str, default: Any) -> Any:
        self._taken.add(key)
        value = self._settings.get(key, default)
        if value is _REQUIRED:
            raise InputError(f"{self._name} does not tell {key}, without which the model cannot be built; add it.")
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> InputError:
        return InputError(f"{self._name} has {key} {value!r}, but it must be {wanted}.")

    def optional_integer(self, key: str, default: Any = _REQUIRED) -> int | None:
        value = self.take(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._wrong(key, value, "an integer")
        return value

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        # A default of None means that the key may be absent only if nothing else tells its value.
        value = self.optional_integer(key, _REQUIRED if default is None else default)
        if value is None:
            raise self._wrong(key, value, "an integer")
        return value

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.take(key, default)
        several = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
        if any(isinstance(one, bool) or not isinstance(one, int) for one in several):
            raise self._wrong(key, value, "an integer or a list of integers")
        return several

    def optional_number(self, key: str, default: Any = _REQUIRED) -> float | None:
        value = self.take(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        return float(value)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.optional_number(key, default)
        if value is None:
            raise self._wrong(key, value, "a number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def expect(self, key: str, supported: tuple[Any, ...], default: Any) -> None:
        value = self.take(key, default)
        if value not in supported:
            named = _listed(value for value in supported if value is not None)
            raise InputError(f"{self._name} has {key} {value!r}, which is not supported; supported is {named}.")

    def refuse(self, key: str, value: object) -> InputError:
        return InputError(
            f"{self._name} sets {key} to {_short(value)}, which this package does not compute; use a checkpoint "
            "without it, or delete the key if it does not change the model."
        )

    def refuse_rest(self, without_effect: frozenset[str], prefix: str = "") -> None:
        """Refuses what was not taken, unless it is known to have no effect or is switched off."""
        for key, value in self._settings.items():
            known = key in self._taken or key in without_effect
            if not key.startswith(prefix) or key.startswith("_") or known:
                continue
            if not _is_off(value):
                raise self.refuse(key, value)


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in (0, "", [], {})


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _listed(values: Any) -> str:
    texts = [repr(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else "none"


def _shortest(value: float) -> float:
    # GGUF stores float32: 9.99999974e-06 is 1e-05 there, and is read as what the author wrote.
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    for digits in range(1, 10):
        candidate = float(f"{single:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", candidate))[0] == single:
            return candidate
    return single


def _per_head(embed: int, heads: int, source: str) -> int:
    if heads < 1 or embed % heads:
        raise InputError(
            f"{source} gives no head_dim, and its width {embed} does not divide among {heads} heads; add head_dim."
        )
    return embed // heads


def _per_kv(heads: int, kv_heads: int, source: str) -> int:
    if kv_heads < 1 or heads % kv_heads:
        raise InputError(
            f"{source} has {heads} query heads and {kv_heads} key/value heads, but the first number must be a "
            "multiple of the second."
        )
    return heads // kv_heads


def _agreed(spellings: Mapping[str, Any], source: str, default: Any) -> Any:
    """The one value that several spellings of a setting give, `default` if none gives any."""
    given = {key: value for key, value in spellings.items() if value is not None}
    if len(set(given.values())) > 1:
        told = " and ".join(f"{key} {value!r}" for key, value in given.items())
        raise InputError(f"{source} has {told}, which contradict each other; keep the right one.")
    return next(iter(given.values()), default)


def _hf_rope_theta(document: _Document) -> float:
    spellings = {"rope_theta": document.optional_number("rope_theta", None)}
    for key in ("rope_parameters", "rope_scaling"):
        rope = document.take(key, None) or {}
        if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
            raise document.refuse(key, rope)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise InputError(
                f"config.json asks for the rope type {kind!r} in {key}, which is not supported; supported is "
                "'default', without scaling."
            )
        for name, value in rope.items():
            unscaled = name in ("factor", "partial_rotary_factor") and value == 1.0
            if name not in ("rope_type", "type", "rope_theta") and not unscaled and not _is_off(value):
                raise document.refuse(f"{key}.{name}", value)
        spellings[f"{key}.rope_theta"] = _Document(rope, f"config.json's {key}").optional_number("rope_theta", None)
    return _agreed(spellings, "config.json", 10000.0)


def _hf_windows(document: _Document, layers: int, default: int | None) -> tuple[int | None, ...]:
    # llama has no window at all: there the key is left in the document, to be refused if it is set.
    window = document.optional_integer("sliding_window", default) if default is not None else None
    if document.take("use_sliding_window", None) is False and window is not None:
        raise InputError(
            f"config.json has a sliding_window of {window} and use_sliding_window false, and programs differ in which "
            "of them they heed; set sliding_window to null, or remove use_sliding_window."
        )
    kinds = document.take("layer_types", None)
    if kinds is None:
        return (window,) * layers
    if len(kinds) != layers:
        raise InputError(
            f"config.json has {len(kinds)} layer_types for {layers} layers (num_hidden_layers); give one a layer."
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise document.refuse("layer_types", kind)
        if kind == "sliding_attention" and window is None:
            raise InputError(
                "config.json has sliding_attention among its layer_types but no sliding_window; add its size."
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _mistral_windows(document: _Document, layers: int) -> tuple[int | None, ...]:
    spellings = {}
    for key in ("sliding_window", "_sliding_window"):
        value = document.take(key, None)
        pattern = value if isinstance(value, list | tuple) else None if value is None else [value]
        sizes = [] if pattern is None else [window for window in pattern if window is not None]
        if any(isinstance(window, bool) or not isinstance(window, int) for window in sizes):
            raise InputError(f"params.json has {key} {value!r}, but it must be an integer, null, or a list of these.")
        spellings[key] = None if pattern is None else tuple(pattern)
    pattern = _agreed(spellings, "params.json", (None,))
    if not pattern or layers % len(pattern):
        raise InputError(
            f"params.json has a sliding_window pattern of {len(pattern)} layers, which does not divide the "
            f"{layers} layers of the model; give a pattern that does."
        )
    return pattern * (layers // len(pattern))
