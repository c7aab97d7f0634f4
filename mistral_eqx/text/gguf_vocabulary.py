"""The vocabulary that a GGUF file carries in its metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ..checkpoint.gguf import read_gguf
from ..errors import InputError
from .huggingface import SPACE_PREFIX, HuggingFaceTokenizer
from .pre_tokenizers import PRE_TOKENIZERS
from .sentencepiece import SentencePieceTokenizer
from .sentencepiece_model import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, write_model
from .tokenizer import AbstractTokenizer


def read_gguf_tokenizer(path: Path) -> AbstractTokenizer:
    """Reads the vocabulary of a GGUF file, not its tensors.

    **Arguments:**

    - `path`: a file whose `tokenizer.ggml.model` is `llama` (sentencepiece) or `gpt2` (byte-level BPE).

    **Returns:** a tokenizer; it adds the beginning of a text if the file says so or, where it says nothing, if
    llama.cpp does for such a vocabulary.

    **Raises:** `ValueError` if the file is damaged, lacks a part, or has a vocabulary of another kind.
    """
    metadata, _ = read_gguf(path)
    for token in _required(metadata, "tokens", path):
        # Bytes that are no UTF-8 come from the reader as lone surrogates.
        if not token.isascii() and any("\ud800" <= character <= "\udfff" for character in token):
            raise InputError(f"{path} is damaged: its vocabulary has the token {token!r}, no UTF-8; fetch it again.")
    kind = _required(metadata, "model", path)
    if kind == "llama":
        return _sentencepiece(metadata, path)
    if kind == "gpt2":
        return _byte_level(metadata, path)
    raise InputError(
        f"The vocabulary of {path} is of the kind {kind!r} (tokenizer.ggml.model), and only 'llama' and 'gpt2' can be "
        "read; use the model's folder with its tokenizer.json."
    )


def _sentencepiece(metadata: Mapping[str, Any], path: Path) -> SentencePieceTokenizer:
    tokens, types = _required(metadata, "tokens", path), _required(metadata, "token_type", path)
    scores = _required(metadata, "scores", path)
    _same_length(path, tokens=tokens, token_type=types, scores=scores)
    normal = [score for score, kind in zip(scores, types, strict=True) if kind == NORMAL]
    if len(normal) > 1 and min(normal) == max(normal):
        raise InputError(
            f"All scores of the vocabulary of {path} are equal (tokenizer.ggml.scores), so it does not say which "
            "tokens to join first; use the model's folder with its tokenizer.json."
        )
    bos_id, eos_ids = _ends(metadata, path, len(tokens))
    eos_id = metadata.get("tokenizer.ggml.eos_token_id")
    pieces = list(zip(tokens, scores, types, strict=True))
    model = write_model(
        pieces,
        add_dummy_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
        remove_extra_whitespaces=metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
        precompiled_charsmap=bytes(metadata.get("tokenizer.ggml.precompiled_charsmap", [])),
    )
    return SentencePieceTokenizer(
        model,
        name=str(path),
        bos_token=None if bos_id is None else tokens[bos_id],
        eos_token=None if eos_id is None else tokens[eos_id],
        eos_ids=eos_ids,
        adds_bos=metadata.get("tokenizer.ggml.add_bos_token", True),
        chat_template=metadata.get("tokenizer.chat_template"),
        pieces=pieces,
    )


def _byte_level(metadata: Mapping[str, Any], path: Path) -> HuggingFaceTokenizer:
    tokens, types = _required(metadata, "tokens", path), _required(metadata, "token_type", path)
    merges, pre = _required(metadata, "merges", path), _required(metadata, "pre", path)
    _same_length(path, tokens=tokens, token_type=types)
    if pre not in PRE_TOKENIZERS:
        raise InputError(
            f"The vocabulary of {path} is for the pre-tokenizer {pre!r} (tokenizer.ggml.pre), which is none of "
            f"{', '.join(PRE_TOKENIZERS)}; use the model's folder with its tokenizer.json."
        )
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for id, token in enumerate(tokens) if vocabulary[token] != id)
        raise InputError(f"{path} is damaged: its vocabulary has the token {twice!r} twice; fetch it again.")
    cutting = PRE_TOKENIZERS[pre]
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=cutting.ignores_merges))
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"The merges of {path} do not fit its vocabulary ({error}); fetch it again.") from error
    changes = cutting.normalizers()
    if metadata.get("tokenizer.ggml.add_space_prefix", False):
        changes += SPACE_PREFIX
    if changes:
        tokenizer.normalizer = normalizers.Sequence(changes)
    tokenizer.pre_tokenizer = cutting.build()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = [(token, kind) for token, kind in zip(tokens, types, strict=True) if token]
    special = [token for token, kind in kinds if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    own = [token for token, kind in kinds if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])
    bos_id, eos_ids = _ends(metadata, path, len(tokens))
    return HuggingFaceTokenizer(
        tokenizer,
        name=str(path),
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=bos_id is not None and metadata.get("tokenizer.ggml.add_bos_token", cutting.adds_bos),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _required(metadata: Mapping[str, Any], key: str, path: Path) -> Any:
    key = f"tokenizer.ggml.{key}"
    if key not in metadata:
        raise InputError(f"{path} has no {key}; use the model's folder with its tokenizer.json.")
    return metadata[key]


def _same_length(path: Path, **lists: list[Any]):
    if len({len(values) for values in lists.values()}) > 1:
        lengths = " but ".join(f"{len(values)} {key}" for key, values in lists.items())
        raise InputError(f"{path} is damaged: its vocabulary has {lengths}; fetch it again.")


def _ends(metadata: Mapping[str, Any], path: Path, vocab: int) -> tuple[int | None, list[int]]:
    """The ids of the tokens that start and end a text; a turn and a message end one too."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom")]
    for key in keys:
        if metadata.get(key, 0) >= vocab:
            raise InputError(
                f"{path} is damaged: its {key} is {metadata[key]}, outside the vocabulary of {vocab}; fetch it again."
            )
    return metadata.get(keys[0]), [metadata[key] for key in keys[1:] if key in metadata]
