"""The keys of a GGUF file that hold a vocabulary, as llama.cpp reads them."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, normalizers

from ..errors import InputError
from .pre_tokenizers import PRE_TOKENIZERS
from .sentencepiece_model import CONTROL, NORMAL, UNUSED, USER_DEFINED


# Texts that pre-tokenizers split in different places: digits, contractions, spaces, line ends, signs, scripts, accents.
_PROBE = (
    "Hello WORLD's  helloWORLD's you'LL I've 1 12 123 1234 12345678 x86_64 3.14\n\n \n  a\tb \r\n  end   "
    "(((...))) !!! $5+<=>^~| a/b/\n// \u5929\u6c17 caf\u00e9 cafe\u0301 \u0420\u0443\u0441 \U0001f680\U0001f680 "
    "\u00bd\u0661\u0662 '\u0130stanbul' \u01c5x 'Tis \u00a0nb"
)


def byte_level_metadata(tokenizer: Tokenizer, vocab: int, name: str, *, space_prefix: bool) -> dict[str, Any]:
    """The keys of a byte-level BPE vocabulary.

    **Arguments:**

    - `tokenizer`: the tokenizer.
    - `vocab`: the number of token ids.
    - `name`: its file, for error messages.
    - `space_prefix`: whether it adds a space to the start of a text.

    **Raises:** `InputError` if it splits texts in a way that GGUF has no name for.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise InputError(
            f"{name} is a tokenizer of the kind {model['type']}, which is not written to GGUF files; use one with "
            "byte-level BPE, or a tokenizer.model.",
            file=name,
        )
    tokens, types = [f"[PAD{id}]" for id in range(vocab)], [UNUSED] * vocab
    for token, id in model["vocab"].items():
        tokens[id], types[id] = token, NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if not model["merges"]:
        raise InputError(f"{name} has no merges, without which llama.cpp reads no vocabulary; write another format.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(tokenizer, model.get("ignore_merges", False), name),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }


def _pre_tokenizer(tokenizer: Tokenizer, ignores_merges: bool, name: str) -> str:
    """The name of the pre-tokenizer that splits texts as this one does, found by what it makes of a text."""
    expected = _words(tokenizer.normalizer, tokenizer.pre_tokenizer)
    for candidate, pre in PRE_TOKENIZERS.items():
        steps = pre.normalizers()
        found = _words(normalizers.Sequence(steps) if steps else None, pre.build())
        if found == expected and pre.ignores_merges == ignores_merges:
            return candidate
    raise InputError(
        f"{name} splits texts before it merges in a way that GGUF files have no name for; those with one are "
        f"{', '.join(PRE_TOKENIZERS)}.",
        file=name,
    )


def _words(normalizer: Any, pre_tokenizer: Any) -> list[tuple[str, tuple[int, int]]]:
    text = _PROBE if normalizer is None else normalizer.normalize_str(_PROBE)
    return [] if pre_tokenizer is None else pre_tokenizer.pre_tokenize_str(text)


def sentencepiece_metadata(pieces: Sequence[tuple[str, float, int]], *, space_prefix: bool) -> dict[str, Any]:
    """The keys of a sentencepiece vocabulary.

    **Arguments:**

    - `pieces`: text, score and type of each token.
    - `space_prefix`: whether it adds a space to the start of a text.
    """
    tokens, scores, types = zip(*pieces, strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": [float(score) for score in scores],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }
