"""The vocabulary in the metadata of a GGUF file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ..checkpoint.gguf import eos_ids_by_name, read_gguf
from ..documents import shown
from ..errors import InputError
from .huggingface import SPACE_PREFIX, HuggingFaceTokenizer
from .libraries import as_input_error
from .pre_tokenizers import PRE_TOKENIZERS
from .sentencepiece import SentencePieceTokenizer
from .sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, write_model
from .tokenizer import AbstractTokenizer


def read_gguf_tokenizer(path: Path) -> AbstractTokenizer:
    """Reads the vocabulary of a GGUF file, not its tensors.

    **Arguments:**

    - `path`: a file whose `tokenizer.ggml.model` is `llama` (sentencepiece) or `gpt2` (byte-level BPE).

    **Returns:** the tokenizer. If the file does not give `add_bos_token`, the default is that of llama.cpp for the
    vocabulary.

    **Raises:** `ValueError` if the file is damaged, lacks a key, or has a vocabulary of another kind.
    """
    metadata, _ = read_gguf(path)
    vocabulary = _Vocabulary(metadata, path)
    kind = vocabulary.text("model")
    if kind == "llama":
        return _sentencepiece(vocabulary)
    if kind == "gpt2":
        return _byte_level(vocabulary)
    raise vocabulary.wrong(
        "model",
        f"The vocabulary of {path} is of the kind {shown(kind)} (tokenizer.ggml.model), but only 'llama' and 'gpt2' "
        "are supported; use the model's folder with its tokenizer.json.",
    )


class _Vocabulary:
    """Typed access to the keys of a GGUF file that begin with `tokenizer`.

    **Attributes:**

    - `path`: the file.
    - `tokens`, `types`: the text and the type of each token. An end-of-sequence token has the type of a control token,
        whatever its type in the file, unless it is an ordinary word.
    - `bos_id`, `eos_ids`: the beginning-of-sequence and end-of-sequence tokens.
    """

    def __init__(self, metadata: Mapping[str, Any], path: Path):
        self._metadata, self.path = metadata, path
        self.tokens = self.values("tokens", str)
        for token in self.tokens:
            # `read_gguf` decodes invalid UTF-8 to lone surrogates.
            if not token.isascii() and any("\ud800" <= character <= "\udfff" for character in token):
                raise self.damaged("tokens", f"its vocabulary has the token {shown(token)}, which is not UTF-8")
        types = self.values("token_type", int)
        self.same_length(token_type=types)
        if strange := set(types) - set(range(NORMAL, BYTE + 1)):
            raise self.damaged("token_type", f"its vocabulary has a token of the type {min(strange)}")
        if NORMAL not in types:
            raise self.damaged("token_type", "its vocabulary has no token that is text")
        self.bos_id = self._id("bos")
        named = eos_ids_by_name(self.tokens, self._id("unknown"))
        keyed = [id for id in map(self._id, ("eos", "eot", "eom")) if id is not None]
        self.eos_ids = list(dict.fromkeys([*keyed, *named]))
        for id in self.eos_ids:
            if id in named or types[id] in (USER_DEFINED, UNUSED):
                types[id] = CONTROL
        self.types = types

    def _id(self, name: str) -> int | None:
        id = self._get(f"{name}_token_id", int, "a token id")
        if id is not None and not 0 <= id < len(self.tokens):
            raise self.damaged(
                f"{name}_token_id",
                f"its tokenizer.ggml.{name}_token_id is {id}, outside the vocabulary of {len(self.tokens)}",
            )
        return id

    def flag(self, key: str, default: bool) -> bool:
        """A value that is true or false."""
        value = self._get(key, bool, "true or false")
        return default if value is None else value

    def text(self, key: str) -> str:
        """A required text."""
        self._require(key)
        return self._get(key, str, "a text")

    def values(self, key: str, kind: type[Any]) -> list[Any]:
        """A required list of texts or numbers."""
        self._require(key)
        return self.optional_values(key, kind)

    def optional_values(self, key: str, kind: type[Any]) -> list[Any]:
        """An optional list of texts or numbers, by default empty."""
        values = self._get(key, list, "a list")
        kinds = set(map(type, values or []))
        if not kinds <= ({float, int} if kind is float else {kind}):
            raise self.damaged(key, f"its tokenizer.ggml.{key} must be a list of {_KINDS[kind]}")
        return list(values or [])

    def template(self, name: str = "") -> str | None:
        """The chat template, or that of a name such as `.tool_use`, if the file has it."""
        key = f"tokenizer.chat_template{name}"
        template = self._metadata.get(key)
        if not isinstance(template, str | None):
            raise InputError(
                f"{self.path} is damaged: its {key} is {shown(template)}, not a text; fetch it again.",
                file=self.path,
                key=key,
            )
        return template

    def same_length(self, **lists: list[Any]):
        """Refuses lists whose length is not that of the vocabulary."""
        lists = {"tokens": self.tokens, **lists}
        if len({len(values) for values in lists.values()}) > 1:
            lengths = " but ".join(f"{len(values)} {key}" for key, values in lists.items())
            raise self.damaged(list(lists)[-1], f"its vocabulary has {lengths}")

    def damaged(self, key: str, complaint: str) -> InputError:
        """The error about a damaged file."""
        return self.wrong(key, f"{self.path} is damaged: {complaint}; fetch it again.")

    def wrong(self, key: str, message: str) -> InputError:
        """The error about a key."""
        return InputError(message, file=self.path, key=f"tokenizer.ggml.{key}")

    def _require(self, key: str):
        if f"tokenizer.ggml.{key}" not in self._metadata:
            raise self.wrong(
                key, f"{self.path} has no tokenizer.ggml.{key}; use the model's folder with its tokenizer.json."
            )

    def _get(self, key: str, kind: type[Any], wanted: str) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and type(value) is not kind:
            raise self.damaged(key, f"its tokenizer.ggml.{key} is {shown(value)}, not {wanted}")
        return value


_KINDS = {str: "texts", int: "whole numbers", float: "numbers"}


def _sentencepiece(vocabulary: _Vocabulary) -> SentencePieceTokenizer:
    path, tokens, types = vocabulary.path, vocabulary.tokens, vocabulary.types
    scores = vocabulary.values("scores", float)
    vocabulary.same_length(token_type=types, scores=scores)
    if not all(map(math.isfinite, scores)):
        raise vocabulary.damaged("scores", "its tokenizer.ggml.scores has a number that is not finite")
    normal = [score for score, kind in zip(scores, types, strict=True) if kind == NORMAL]
    if len(normal) > 1 and min(normal) == max(normal):
        raise vocabulary.wrong(
            "scores",
            f"All scores of the vocabulary of {path} are equal (tokenizer.ggml.scores), so the order of its "
            "merges is unknown; use the model's folder with its tokenizer.json.",
        )
    charsmap = vocabulary.optional_values("precompiled_charsmap", int)
    if not all(-128 <= byte <= 255 for byte in charsmap):
        raise vocabulary.damaged(
            "precompiled_charsmap", "its tokenizer.ggml.precompiled_charsmap must be a list of bytes"
        )
    pieces = list(zip(tokens, scores, types, strict=True))
    model = write_model(
        pieces,
        add_dummy_prefix=vocabulary.flag("add_space_prefix", True),
        remove_extra_whitespaces=vocabulary.flag("remove_extra_whitespaces", False),
        precompiled_charsmap=bytes(byte & 0xFF for byte in charsmap),
    )
    return SentencePieceTokenizer(
        model,
        name=str(path),
        bos_token=None if vocabulary.bos_id is None else tokens[vocabulary.bos_id],
        eos_token=tokens[vocabulary.eos_ids[0]] if vocabulary.eos_ids else None,
        eos_ids=vocabulary.eos_ids,
        adds_bos=vocabulary.flag("add_bos_token", True),
        chat_template=vocabulary.template(),
        tool_template=vocabulary.template(".tool_use"),
        pieces=pieces,
    )


def _byte_level(vocabulary: _Vocabulary) -> HuggingFaceTokenizer:
    path, tokens = vocabulary.path, vocabulary.tokens
    merges, pre = vocabulary.values("merges", str), vocabulary.text("pre")
    if pre not in PRE_TOKENIZERS:
        raise vocabulary.wrong(
            "pre",
            f"The vocabulary of {path} is for the pre-tokenizer {shown(pre)} (tokenizer.ggml.pre), but only these are "
            f"supported: {', '.join(PRE_TOKENIZERS)}; use the model's folder with its tokenizer.json.",
        )
    ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for id, token in enumerate(tokens) if ids[token] != id)
        raise vocabulary.damaged("tokens", f"its vocabulary has the token {shown(twice)} twice")
    pre_tokenizer = PRE_TOKENIZERS[pre]
    with as_input_error(path, f"The merges of {path} do not fit its vocabulary"):
        pairs: Any = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = Tokenizer(models.BPE(ids, pairs, ignore_merges=pre_tokenizer.ignores_merges))
    steps = pre_tokenizer.normalizers()
    if vocabulary.flag("add_space_prefix", False):
        steps += SPACE_PREFIX
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizer.build()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = [(token, kind) for token, kind in zip(tokens, vocabulary.types, strict=True) if token]
    special = [token for token, kind in kinds if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    user_defined = [token for token, kind in kinds if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    adds_bos = vocabulary.flag("add_bos_token", pre_tokenizer.adds_bos)
    return HuggingFaceTokenizer(
        tokenizer,
        name=str(path),
        bos_id=vocabulary.bos_id,
        eos_ids=vocabulary.eos_ids,
        adds_bos=vocabulary.bos_id is not None and adds_bos,
        chat_template=vocabulary.template(),
        tool_template=vocabulary.template(".tool_use"),
    )
