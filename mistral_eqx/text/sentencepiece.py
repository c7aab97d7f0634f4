"""Vocabularies that the sentencepiece library reads."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from sentencepiece import SentencePieceProcessor

from ..documents import read_bytes, shown
from ..errors import InputError
from .huggingface import HuggingFaceTokenizer
from .libraries import LARGEST, blame
from .sentencepiece_merges import with_merges
from .sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, checked_types, read_pieces, write_pieces
from .settings import Settings, read_settings
from .tokenizer import AbstractTokenizer, control_pattern, encode_as_text


_SPACE = "\u2581"
# What a model would change that changes more of a text than its spaces.
_PROBE = " A  \u212b\u2460\ufb01e\u0301\u3000 "
# A message of protobuf takes fields that come after it as its own: `normalizer_spec { add_dummy_prefix: false }`.
_WITHOUT_PREFIX = b"\x1a\x02\x18\x00"


@final
class SentencePieceTokenizer(AbstractTokenizer):
    """A vocabulary of sentencepiece: a `.model` file, or the same content in a GGUF file.

    A text gets a space in front when it is encoded, if the vocabulary says so, and loses it when it is decoded. What
    follows a control token gets none: the chat templates write it where one belongs.
    """

    def __init__(
        self,
        model: bytes,
        *,
        name: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        eos_ids: Iterable[int] = (),
        adds_bos: bool = True,
        chat_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
        release_file: Path | None = None,
        pieces: Sequence[tuple[str, float, int]] | None = None,
    ):
        """**Arguments:**

        - `model`: the content of a `.model` file.
        - `name`: where it came from, for messages.
        - `bos_token`: the token that starts a text, if it is not the one of `model`.
        - `eos_token`, `eos_ids`: tokens that end a text, beside the one of `model`.
        - `adds_bos`, `chat_template`, `template_tokens`, `release_file`: as in `AbstractTokenizer`.
        - `pieces`: text, score and type of each token, if `model` was made of them. From these `save` makes a
            `tokenizer.json` too, unless the model changes texts before it cuts them.

        **Raises:** `ValueError` if `model` is no sentencepiece model, or does not have one of the tokens.
        """
        types = checked_types(model, name)
        with blame(name, f"{name} is no sentencepiece model, or it is damaged"):
            self._first = SentencePieceProcessor(model_proto=model)
            self._later = SentencePieceProcessor(model_proto=model + _WITHOUT_PREFIX)
        self.name = name
        self.vocab = self._first.vocab_size()
        bos_id = self._first.bos_id() if bos_token is None else self._id(bos_token)
        self.bos_id = bos_id if bos_id >= 0 else None
        named = [] if eos_token is None else [self._id(eos_token)]
        self.eos_ids = tuple(dict.fromkeys(id for id in [*named, self._first.eos_id(), *eos_ids] if id >= 0))
        self.adds_bos = adds_bos and self.bos_id is not None
        self.chat_template = chat_template
        if template_tokens is not None:
            self.template_tokens = template_tokens
        self.release_file = release_file
        self._pieces = pieces
        with blame(name, f"{name} is no sentencepiece model, or it is damaged"):
            self._strips = self._first.encode("a") != self._later.encode("a")
        # An end token of another type is no text either, unless it is a word that texts have.
        ends = [
            id
            for id in self.eos_ids
            if id < self.vocab and (types[id] == USER_DEFINED or id not in self._encode(self.token_name(id), False))
        ]
        controls = {*ends, *(id for id, kind in enumerate(types) if kind == CONTROL)}
        self.control_tokens = {self._first.id_to_piece(id): id for id in sorted(controls)}
        self.control_pattern = control_pattern([("", self.control_tokens, "")])

    def _id(self, token: str) -> int:
        id = self._first.piece_to_id(token)
        if self._first.id_to_piece(id) != token:
            raise InputError(
                f"The settings beside {self.name} name the token {token!r}, which it does not have; "
                "use a folder that has a tokenizer.json too."
            )
        return id

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        return encode_as_text(self._encode, text, self.control_tokens, first=first)

    def _encode(self, text: str, first: bool) -> list[int]:
        with blame(self.name, f"{self.name} cannot encode the text"):
            return (self._first if first else self._later).encode(text)

    def token_bytes(self, id: int, *, first: bool) -> bytes:
        piece = self._first.id_to_piece(id)
        if self._first.is_byte(id):
            return bytes([int(piece[3:-1], 16)])
        if self._first.is_unknown(id):
            return self._first.decode([id]).encode()
        if first and self._strips:
            piece = piece.removeprefix(_SPACE)
        return piece.replace(_SPACE, " ").encode()

    def write_vocabulary(self, folder: Path) -> Mapping[str, Any]:
        # The version at the end of a release file's name tells the format of its conversations.
        version = self.release_file.name.rpartition(".model")[2] if self.release_file is not None else ""
        (folder / f"tokenizer.model{version}").write_bytes(self._first.serialized_model_proto())
        normalized = ((" " if self._strips else "") + _PROBE).replace(" ", _SPACE)
        all_bytes = sum(self._first.is_byte(id) for id in range(self.vocab)) == 256
        if self._pieces is None or not all_bytes or self._first.normalize(_PROBE) != normalized:
            return {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": self._strips}
        # From the other file transformers makes a tokenizer without the space in front, if the model's type is mistral.
        return HuggingFaceTokenizer(
            with_merges(self._pieces, add_prefix=self._strips),
            name=self.name,
            bos_id=self.bos_id,
            eos_ids=self.eos_ids,
            adds_bos=self.adds_bos,
        ).write_vocabulary(folder)


def read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Reads a `.model` file and the settings beside it.

    **Raises:** `ValueError` if it is damaged, or the settings add tokens that it does not have.
    """
    settings = read_settings(path.parent)
    model = read_bytes(path, LARGEST)
    unknown = [kind for _, _, kind in read_pieces(model, str(path))].count(UNKNOWN)
    if unknown != 1:
        raise InputError(
            f"{path} is no sentencepiece model, or it is damaged (it has {unknown} tokens for unknown words, not one); "
            "fetch it again.",
            file=path,
        )
    return SentencePieceTokenizer(
        model + _added_pieces(model, settings, path),
        name=str(path),
        bos_token=settings.bos_token,
        eos_token=settings.eos_token,
        eos_ids=settings.eos_ids,
        adds_bos=settings.add_bos is not False,
        chat_template=settings.chat_template,
        template_tokens=settings.template_tokens,
        release_file=path,
    )


def _added_pieces(model: bytes, settings: Settings, path: Path) -> bytes:
    """What `model` lacks of the tokens that the settings add, to be written behind it.

    **Raises:** `ValueError` if a token has another id in `model`, or ids are left out.
    """
    tokens = [piece for piece, _, _ in read_pieces(model, str(path))] if settings.added_tokens else []
    added: list[tuple[str, float, int]] = []
    for text, id in sorted(settings.added_tokens.items(), key=lambda entry: entry[1]):
        if id == len(tokens) and text not in tokens:
            tokens.append(text)
            added.append((text, 0.0, CONTROL if text in settings.special_tokens else USER_DEFINED))
        elif not 0 <= id < len(tokens) or tokens[id] != text:
            raise InputError(
                f"The settings in {path.parent} give the token {shown(text)} the id {id}, and {path.name} does not; "
                "use a folder that has a tokenizer.json too.",
                file=path,
                key=text,
            )
    return write_pieces(added)
