"""The vocabulary that a GGUF file carries in its metadata."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ..checkpoint.gguf import eos_ids_by_name, read_gguf
from ..documents import shown
from ..errors import InputError
from .huggingface import SPACE_PREFIX, HuggingFaceTokenizer
from .libraries import blame
from .pre_tokenizers import PRE_TOKENIZERS
from .sentencepiece import SentencePieceTokenizer
from .sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, write_model
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
    vocabulary = _Vocabulary(metadata, path)
    kind = vocabulary.text("model")
    if kind == "llama":
        return _sentencepiece(vocabulary)
    if kind == "gpt2":
        return _byte_level(vocabulary)
    raise vocabulary.wrong(
        "model",
        f"The vocabulary of {path} is of the kind {shown(kind)} (tokenizer.ggml.model), and only 'llama' and 'gpt2' "
        "can be read; use the model's folder with its tokenizer.json.",
    )


class _Vocabulary:
    """The keys of a GGUF file that begin with `tokenizer`, checked as they are read.

    **Attributes:**

    - `path`: the file.
    - `tokens`, `types`: the text and the type of each token; one that ends a text is a control token, whatever the file
        says of it, unless it is an ordinary word.
    - `bos_id`, `eos_ids`: the tokens that start and end a text.
    """

    def __init__(self, metadata: Mapping[str, Any], path: Path):
        self._metadata, self.path = metadata, path
        self.tokens = self.values("tokens", str)
        for token in self.tokens:
            # Bytes that are no UTF-8 come from the reader as lone surrogates.
            if not token.isascii() and any("\ud800" <= character <= "\udfff" for character in token):
                raise self.damaged("tokens", f"its vocabulary has the token {shown(token)}, no UTF-8")
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
        """True or false."""
        value = self._get(key, bool, "true or false")
        return default if value is None else value

    def text(self, key: str) -> str:
        """A text that must be there."""
        self._require(key)
        return self._get(key, str, "a text")

    def values(self, key: str, kind: type[Any]) -> list[Any]:
        """A list of texts or numbers that must be there."""
        self._require(key)
        return self.optional_values(key, kind)

    def optional_values(self, key: str, kind: type[Any]) -> list[Any]:
        """A list of texts or numbers, empty if it is not there."""
        values = self._get(key, list, "a list")
        kinds = set(map(type, values or []))
        if not kinds <= ({float, int} if kind is float else {kind}):
            raise self.damaged(key, f"its tokenizer.ggml.{key} must be a list of {_KINDS[kind]}")
        return list(values or [])

    @property
    def chat_template(self) -> str | None:
        """The template of conversations, if there is one."""
        template = self._metadata.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise InputError(
                f"{self.path} is damaged: its tokenizer.chat_template is {shown(template)}, not a text; fetch it "
                "again.",
                file=self.path,
                key="tokenizer.chat_template",
            )
        return template

    def same_length(self, **lists: list[Any]):
        """Refuses lists that are not as long as the vocabulary."""
        lists = {"tokens": self.tokens, **lists}
        if len({len(values) for values in lists.values()}) > 1:
            lengths = " but ".join(f"{len(values)} {key}" for key, values in lists.items())
            raise self.damaged(list(lists)[-1], f"its vocabulary has {lengths}")

    def damaged(self, key: str, complaint: str) -> InputError:
        """The error for a file that cannot be right."""
        return self.wrong(key, f"{self.path} is damaged: {complaint}; fetch it again.")

    def wrong(self, key: str, message: str) -> InputError:
        """The error for a key."""
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
            f"All scores of the vocabulary of {path} are equal (tokenizer.ggml.scores), so it does not say which "
            "tokens to join first; use the model's folder with its tokenizer.json.",
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
        chat_template=vocabulary.chat_template,
        pieces=pieces,
    )


def _byte_level(vocabulary: _Vocabulary) -> HuggingFaceTokenizer:
    path, tokens = vocabulary.path, vocabulary.tokens
    merges, pre = vocabulary.values("merges", str), vocabulary.text("pre")
    if pre not in PRE_TOKENIZERS:
        raise vocabulary.wrong(
            "pre",
            f"The vocabulary of {path} is for the pre-tokenizer {shown(pre)} (tokenizer.ggml.pre), which is none of "
            f"{', '.join(PRE_TOKENIZERS)}; use the model's folder with its tokenizer.json.",
        )
    ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for id, token in enumerate(tokens) if ids[token] != id)
        raise vocabulary.damaged("tokens", f"its vocabulary has the token {shown(twice)} twice")
    cutting = PRE_TOKENIZERS[pre]
    with blame(path, f"The merges of {path} do not fit its vocabulary"):
        pairs: Any = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = Tokenizer(models.BPE(ids, pairs, ignore_merges=cutting.ignores_merges))
    changes = cutting.normalizers()
    if vocabulary.flag("add_space_prefix", False):
        changes += SPACE_PREFIX
    if changes:
        tokenizer.normalizer = normalizers.Sequence(changes)
    tokenizer.pre_tokenizer = cutting.build()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = [(token, kind) for token, kind in zip(tokens, vocabulary.types, strict=True) if token]
    special = [token for token, kind in kinds if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    own = [token for token, kind in kinds if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])
    adds_bos = vocabulary.flag("add_bos_token", cutting.adds_bos)
    return HuggingFaceTokenizer(
        tokenizer,
        name=str(path),
        bos_id=vocabulary.bos_id,
        eos_ids=vocabulary.eos_ids,
        adds_bos=vocabulary.bos_id is not None and adds_bos,
        chat_template=vocabulary.chat_template,
    )
