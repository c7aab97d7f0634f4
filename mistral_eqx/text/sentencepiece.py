"""Vocabularies that the sentencepiece library reads."""

from collections.abc import Iterable
from pathlib import Path
from typing import final

from sentencepiece import SentencePieceProcessor

from .settings import read_settings
from .tokenizer import AbstractTokenizer, control_pattern


_SPACE = "\u2581"
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
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        adds_bos: bool = True,
        chat_template: str | None = None,
        release_file: Path | None = None,
    ):
        """**Arguments:**

        - `model`: the content of a `.model` file.
        - `name`: where it came from, for messages.
        - `bos_id`: overrides what `model` says.
        - `eos_ids`: tokens that end a text, beside the one of `model`.
        - `adds_bos`, `chat_template`, `release_file`: as in `AbstractTokenizer`.

        **Raises:** `ValueError` if `model` is no sentencepiece model.
        """
        try:
            self._first = SentencePieceProcessor(model_proto=model)
            self._later = SentencePieceProcessor(model_proto=model + _WITHOUT_PREFIX)
        except RuntimeError as error:
            raise ValueError(
                f"{name} is no sentencepiece model, or it is damaged ({error}); fetch it again."
            ) from error
        if not model or self._first.vocab_size() == 0:
            raise ValueError(f"{name} is empty; a sentencepiece model has a vocabulary.")
        self.name = name
        self.vocab = self._first.vocab_size()
        controls = [id for id in range(self.vocab) if self._first.is_control(id)]
        self.control_tokens = {self._first.id_to_piece(id): id for id in controls}
        self.control_pattern = control_pattern([("", self.control_tokens, "")])
        own_bos = self._first.bos_id()
        self.bos_id = bos_id if bos_id is not None else own_bos if own_bos >= 0 else None
        own = [id for id in [self._first.eos_id()] if id >= 0]
        self.eos_ids = tuple(dict.fromkeys([*own, *eos_ids]))
        self.adds_bos = adds_bos and self.bos_id is not None
        self.chat_template = chat_template
        self.release_file = release_file
        self._strips = self._first.encode("a") != self._later.encode("a")

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
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


def read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Reads a `.model` file and the settings beside it.

    **Raises:** `ValueError` if it is damaged, or the settings add tokens that it does not have.
    """
    settings = read_settings(path.parent)
    tokenizer = SentencePieceTokenizer(
        path.read_bytes(),
        name=str(path),
        eos_ids=settings.eos_ids,
        adds_bos=settings.add_bos is not False,
        chat_template=settings.chat_template,
        release_file=path,
    )
    missing = [text for text, id in settings.added_tokens.items() if id >= tokenizer.vocab]
    if missing:
        raise ValueError(
            f"{path.parent} adds {missing[0]!r} to the tokens of {path.name}, which does not have it; "
            "use a folder that has a tokenizer.json too."
        )
    return tokenizer
