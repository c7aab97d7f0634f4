"""The sizes and constants of a model, and how each checkpoint format writes them down."""

import dataclasses
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le, Lt

from .checks import Count, CountOrZero, check_fields, checked
from .documents import shown
from .errors import InputError


# Far above every published model, and low enough that no product of two of them is out of reach of an integer.
Size = Annotated[int, Ge(1), Le(2**24)]
# Layers are counted out before weights are read; published models have some hundred at most.
Layers = Annotated[int, Ge(1), Le(10_000)]
# Published models have from 1e4 to 1e11. Below 1 and far above, wavelengths are no numbers of float32.
Base = Annotated[float, Ge(1), Le(1e18)]
# Published models have 1e-5 or 1e-6. What is smaller than this is lost in float32.
Epsilon = Annotated[float, Ge(1e-20), Lt(1)]


@dataclasses.dataclass(frozen=True)
class Rope:
    """The angles of the rotary embedding ([RoFormer](https://arxiv.org/abs/2104.09864)).

    **Attributes:**

    - `dim`: how many entries of a head are rotated, two by two.
    - `theta`: the base of the wavelengths.
    """

    dim: int
    theta: float

    @property
    def inv_freq(self) -> np.ndarray:
        """The angle of each pair per position, in radians and float64, shape `(dim / 2,)`."""
        return self.theta ** -(np.arange(0, self.dim, 2) / self.dim)


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

    **Raises:** `ValueError` if a field is of another type or outside its range, `head_dim` is odd (a rotary pair would
    be missing its second entry), or `windows` does not have one entry a layer.
    """

    vocab: Size
    embed: Size
    hidden: Size
    layers: Layers
    kv_heads: Size
    q_per_kv: Size
    head_dim: Size
    rope_theta: Base
    norm_eps: Epsilon
    max_positions: Count
    windows: tuple[Count | None, ...]
    tied: bool = False
    bos_id: CountOrZero | None = None
    eos_ids: tuple[CountOrZero, ...] = ()

    def __post_init__(self):
        check_fields(self, "The config's {}".format)
        if self.head_dim % 2:
            raise InputError(
                f"The config's head_dim is {self.head_dim}, but it must be even: the rotary embedding turns pairs.",
                key="head_dim",
            )
        if len(self.windows) != self.layers:
            raise InputError(
                f"The config has {len(self.windows)} windows for {self.layers} layers; give one entry a layer, "
                "None where a layer sees all positions.",
                key="windows",
            )

    @property
    def rope(self) -> Rope:
        """The angles of the rotary embedding."""
        return Rope(self.head_dim, self.rope_theta)

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
    def from_hf(cls, settings: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None) -> "MistralConfig":
        """Reads a Hugging Face `config.json` of model type `mistral`, `ministral` or `llama`.

        A key that is absent has the default of that model type in transformers: a `mistral` without the key
        `sliding_window` has a window of 4096, one with `"sliding_window": null` has none.

        **Arguments:**

        - `settings`: the parsed JSON object.
        - `file`: where it stands, for messages.

        **Returns:** the config.

        **Raises:** `ValueError` that names the key, if one is missing, has a value that it cannot have, contradicts
        another, or asks for a computation that this package does not do.
        """
        document = _Document(settings, "config.json", file)
        model_type = document.take("model_type", str | None, None)
        if model_type not in _HF_DEFAULTS:
            raise document.wrong(
                "model_type",
                f"{document.name} has model_type {shown(model_type)}, which is not supported; the supported ones are "
                f"{_listed(_HF_DEFAULTS)}.",
            )
        for architecture in document.take("architectures", list[str] | None, None) or ():
            if architecture not in _HF_ARCHITECTURES:
                raise document.wrong(
                    "architectures",
                    f"{document.name} names the architecture {shown(architecture)} in architectures, which is not "
                    f"supported; the supported ones are {_listed(_HF_ARCHITECTURES)}.",
                )
        defaults = _HF_DEFAULTS[model_type]
        embed = document.take("hidden_size", Size, 4096)
        layers = document.take("num_hidden_layers", Layers, 32)
        heads = document.take("num_attention_heads", Size, 32)
        kv_heads = document.take("num_key_value_heads", Size | None, defaults["num_key_value_heads"]) or heads
        head_dim = document.take("head_dim", Size | None, None) or _per_head(embed, heads, document)
        document.expect("hidden_act", ("silu", "swish"), "silu")
        document.expect("partial_rotary_factor", (1.0, None), None, float | None)
        for key in ("torch_dtype", "dtype"):  # the weights have dtypes of their own
            document.take(key, str | None, None)
        document.expect("is_causal", (True, None), None)
        config = document.make(
            cls,
            vocab=document.take("vocab_size", Size, 32000),
            embed=embed,
            hidden=document.take("intermediate_size", Size, defaults["intermediate_size"]),
            layers=layers,
            kv_heads=kv_heads,
            q_per_kv=_per_kv(heads, kv_heads, document),
            head_dim=head_dim,
            rope_theta=_hf_rope_theta(document),
            norm_eps=document.take("rms_norm_eps", Epsilon, 1e-6),
            max_positions=document.take("max_position_embeddings", Count, defaults["max_position_embeddings"]),
            windows=_hf_windows(document, layers, defaults["sliding_window"]),
            tied=document.take("tie_word_embeddings", bool, False),
            bos_id=document.take("bos_token_id", CountOrZero | None, 1),
            eos_ids=document.ids("eos_token_id", (2,)),
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
    def from_params_json(
        cls, settings: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None
    ) -> "MistralConfig":
        """Reads the `params.json` of a Mistral release.

        Releases that do not tell the longest context get 32768 positions, and those that do not tell the rope base
        10000, as in Mistral's own code. The tokens that start and end a text are 1 and 2, as in all its tokenizers,
        unless the file was written by `to_params_json` and says otherwise.

        **Arguments:**

        - `settings`: the parsed JSON object.
        - `file`: where it stands, for messages.

        **Returns:** the config.

        **Raises:** `ValueError` that names the key, if one is missing, has a value that it cannot have, contradicts
        another, or asks for a computation that this package does not do.
        """
        document = _Document(settings, "params.json", file)
        document.expect("model_type", ("transformer", None), None)
        document.expect("activation", ("silu", None), None)
        document.expect("causal", (True, None), None)
        layers = document.take("n_layers", Layers)
        heads = document.take("n_heads", Size)
        kv_heads = document.take("n_kv_heads", Size)
        rope_theta = document.take("rope_theta", Base | None, None)
        config = document.make(
            cls,
            vocab=document.take("vocab_size", Size),
            embed=document.take("dim", Size),
            hidden=document.take("hidden_dim", Size),
            layers=layers,
            kv_heads=kv_heads,
            q_per_kv=_per_kv(heads, kv_heads, document),
            head_dim=document.take("head_dim", Size),
            rope_theta=10000.0 if rope_theta is None else rope_theta,
            norm_eps=document.take("norm_eps", Epsilon),
            max_positions=_agreed(
                {key: document.take(key, Count | None, None) for key in ("max_position_embeddings", "max_seq_len")},
                document,
                32768,
            ),
            windows=_mistral_windows(document, layers),
            tied=document.take("tied_embeddings", bool, False),
            bos_id=document.take("bos_id", CountOrZero | None, 1),
            eos_ids=document.ids("eos_ids", (2,)),
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
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, tied: bool = False, file: str | os.PathLike[str] | None = None
    ) -> "MistralConfig":
        """Reads the metadata of a GGUF file of architecture `llama`, which is what llama.cpp calls Mistral's too.

        **Arguments:**

        - `metadata`: the file's keys and values; arrays need a length only.
        - `tied`: whether the head is the embedding table, which no key tells: it is so if the file holds no tensor
            `output.weight`.
        - `file`: where they stand, for messages.

        **Returns:** the config. A file that does not tell a window has none, and one that does not tell the rope base
        has 10000, as in llama.cpp.

        **Raises:** `ValueError` that names the key, if one is missing, has a value that it cannot have, or asks for a
        computation that this package does not do.
        """
        document = _Document(metadata, "GGUF metadata", file)
        document.expect("general.architecture", ("llama",), None)
        document.expect("general.type", ("model", None), None)
        parts = document.take("split.count", CountOrZero | None, None) or 1
        if parts > 1:
            raise document.wrong(
                "split.count",
                f"{document.name} is one of {parts} parts; put them together first, with llama.cpp's "
                "llama-gguf-split --merge.",
            )
        document.expect("llama.rope.scaling.type", ("none", None), None)
        document.expect("llama.rope.scaling.factor", (0.0, 1.0, None), None, float | None)
        document.expect("llama.attention.causal", (True, None), None)
        layers = document.take("llama.block_count", Layers)
        embed = document.take("llama.embedding_length", Size)
        heads = document.take("llama.attention.head_count", Size)
        kv_heads = document.take("llama.attention.head_count_kv", Size, heads)
        head_dim = document.take(
            "llama.attention.key_length", Size, embed // heads if embed % heads == 0 else _REQUIRED
        )
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            document.expect(key, (head_dim,), head_dim, Size)
        tokens = document.take("tokenizer.ggml.tokens", Any, None)
        count = None if tokens is None or isinstance(tokens, str) else getattr(tokens, "__len__", None)
        vocab = document.take("llama.vocab_size", Size, _REQUIRED if count is None else count())
        window = document.take("llama.attention.sliding_window", CountOrZero | None, None)
        ids = {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom")}
        bos_id, *eos_ids = (document.take(key, CountOrZero | None, None) for key in ids.values())
        unknown_id = document.take("tokenizer.ggml.unknown_token_id", CountOrZero | None, None)
        eos_ids += [id for id in ends_by_name(tokens, unknown_id) if id < vocab]
        config = document.make(
            cls,
            vocab=vocab,
            embed=embed,
            hidden=document.take("llama.feed_forward_length", Size),
            layers=layers,
            kv_heads=kv_heads,
            q_per_kv=_per_kv(heads, kv_heads, document),
            head_dim=head_dim,
            rope_theta=_shortest(document.take("llama.rope.freq_base", Base, 10000.0)),
            norm_eps=_shortest(document.take("llama.attention.layer_norm_rms_epsilon", Epsilon)),
            max_positions=document.take("llama.context_length", Count),
            windows=(window or None,) * layers,
            tied=tied,
            bos_id=bos_id,
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
    """Settings that are taken key by key, each held to its type, so that what nobody took can be refused."""

    def __init__(self, settings: Mapping[str, Any], kind: str, file: str | os.PathLike[str] | None):
        self.name = kind if file is None else repr(os.fspath(file))
        self.file = file
        if not isinstance(settings, Mapping):
            raise self.wrong(None, f"{self.name} is {shown(settings)}; it must be a table of keys and values.")
        self._settings = settings
        self._taken: set[str] = set()

    def wrong(self, key: str | None, sentence: str) -> InputError:
        return InputError(sentence, file=self.file, key=key)

    def take(self, key: str, kind: Any, default: Any = _REQUIRED) -> Any:
        """The value of a key, held to its type, or its default."""
        self._taken.add(key)
        if key not in self._settings:
            if default is _REQUIRED:
                raise self.wrong(
                    key, f"{self.name} does not tell {key}, without which the model cannot be built; add it."
                )
            return default
        return checked(self._settings[key], kind, f"The key {key} of {self.name}", file=self.file, key=key)

    def ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One token or several."""
        value = self.take(key, CountOrZero | list[CountOrZero] | None, default)
        return () if value is None else (value,) if isinstance(value, int) else tuple(value)

    def expect(self, key: str, supported: tuple[Any, ...], default: Any, kind: Any = Any):
        """Refuses a value that asks for something other than what this package computes."""
        value = self.take(key, kind, default)
        if not any(type(value) is type(one) and value == one for one in supported):
            named = _listed(value for value in supported if value is not None)
            raise self.wrong(
                key, f"{self.name} has {key} {shown(value)}, which is not supported; supported is {named}."
            )

    def make(self, config: type[MistralConfig], **fields: Any) -> MistralConfig:
        """The config; what its fields contradict in each other is the file's mistake."""
        try:
            return config(**fields)
        except InputError as error:
            raise InputError(f"{self.name} cannot be used: {error}", file=self.file, key=error.key) from error

    def refuse(self, key: str, value: object) -> InputError:
        return self.wrong(
            key,
            f"{self.name} sets {key} to {shown(value)}, which this package does not compute; use a checkpoint "
            "without it, or delete the key if it does not change the model.",
        )

    def refuse_rest(self, without_effect: frozenset[str], prefix: str = ""):
        """Refuses what was not taken, unless it is known to have no effect or is switched off."""
        for key, value in self._settings.items():
            known = key in self._taken or key in without_effect
            if not key.startswith(prefix) or key.startswith("_") or known:
                continue
            if not _is_off(value):
                raise self.refuse(key, value)


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in (0, "", [], {})


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


def _per_head(embed: int, heads: int, document: _Document) -> int:
    if embed % heads:
        raise document.wrong(
            "head_dim",
            f"{document.name} gives no head_dim, and its width {embed} does not divide among {heads} heads; add "
            "head_dim.",
        )
    return embed // heads


def _per_kv(heads: int, kv_heads: int, document: _Document) -> int:
    if heads % kv_heads:
        raise document.wrong(
            None,
            f"{document.name} has {heads} query heads and {kv_heads} key/value heads, but the first number must be a "
            "multiple of the second.",
        )
    return heads // kv_heads


def _agreed(spellings: Mapping[str, Any], document: _Document, default: Any) -> Any:
    """The one value that several spellings of a setting give, `default` if none gives any."""
    given = {key: value for key, value in spellings.items() if value is not None}
    if len(set(given.values())) > 1:
        told = " and ".join(f"{key} {shown(value)}" for key, value in given.items())
        raise document.wrong(
            next(iter(given)), f"{document.name} has {told}, which contradict each other; keep the right one."
        )
    return next(iter(given.values()), default)


def _hf_rope_theta(document: _Document) -> float:
    spellings = {"rope_theta": document.take("rope_theta", Base | None, None)}
    for key in ("rope_parameters", "rope_scaling"):
        rope = document.take(key, dict[str, Any] | None, None) or {}
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise document.refuse(key, rope)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise document.wrong(
                key,
                f"{document.name} asks for the rope type {shown(kind)} in {key}, which is not supported; supported is "
                "'default', without scaling.",
            )
        for name, value in rope.items():
            unscaled = name in ("factor", "partial_rotary_factor") and value == 1.0 and value is not True
            if name not in ("rope_type", "type", "rope_theta") and not unscaled and not _is_off(value):
                raise document.refuse(f"{key}.{name}", value)
        inner = f"{key}.rope_theta"
        spellings[inner] = checked(
            rope.get("rope_theta"), Base | None, f"The key {inner} of {document.name}", file=document.file, key=inner
        )
    return _agreed(spellings, document, 10000.0)


def _hf_windows(document: _Document, layers: int, default: int | None) -> tuple[int | None, ...]:
    # llama has no window at all: there the key is left in the document, to be refused if it is set.
    window = document.take("sliding_window", Count | None, default) if default is not None else None
    if document.take("use_sliding_window", bool | None, None) is False and window is not None:
        raise document.wrong(
            "use_sliding_window",
            f"{document.name} has a sliding_window of {window} and use_sliding_window false, and programs differ in "
            "which of them they heed; set sliding_window to null, or remove use_sliding_window.",
        )
    kinds = document.take("layer_types", list[str] | None, None)
    if kinds is None:
        return (window,) * layers
    if len(kinds) != layers:
        raise document.wrong(
            "layer_types",
            f"{document.name} has {len(kinds)} layer_types for {layers} layers (num_hidden_layers); give one a layer.",
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise document.refuse("layer_types", kind)
        if kind == "sliding_attention" and window is None:
            raise document.wrong(
                "sliding_window",
                f"{document.name} has sliding_attention among its layer_types but no sliding_window; add its size.",
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _mistral_windows(document: _Document, layers: int) -> tuple[int | None, ...]:
    spellings = {}
    for key in ("sliding_window", "_sliding_window"):
        value = document.take(key, Count | list[Count | None] | None, None)
        spellings[key] = None if value is None else (value,) if isinstance(value, int) else tuple(value)
    pattern: Sequence[int | None] = _agreed(spellings, document, (None,))
    if not pattern or layers % len(pattern):
        raise document.wrong(
            "sliding_window",
            f"{document.name} has a sliding_window pattern of {len(pattern)} layers, which does not divide the "
            f"{layers} layers of the model; give a pattern that does.",
        )
    return (*pattern,) * (layers // len(pattern))
