"""Tokenizers of the sentencepiece library."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from sentencepiece import SentencePieceProcessor

from ..documents import read_bytes, shown
from ..errors import InputError
from .gguf_metadata import sentencepiece_metadata
from .huggingface import HuggingFaceTokenizer
from .libraries import LARGEST, as_input_error
from .sentencepiece_merges import with_merges
from .sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, checked_types, read_chunks, write_pieces
from .settings import Settings, read_settings
from .tokenizer import AbstractTokenizer, control_pattern, encode_as_text


_SPACE = "\u2581"
# A text that changes under any normalisation beyond that of spaces.
_PROBE = " A  \u212b\u2460\ufb01e\u0301\u3000 "
# Fields appended to a protobuf message override its own: `normalizer_spec { add_dummy_prefix: false }`.
_WITHOUT_PREFIX = b"\x1a\x02\x18\x00"


@final
class SentencePieceTokenizer(AbstractTokenizer):
    """A sentencepiece tokenizer, from a `.model` file or a GGUF file.

    If the vocabulary says so, encoding adds a leading space to a text, and decoding removes it. Text after a control
    token gets no leading space: chat templates write the spaces that they need.
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
        tool_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
        release_file: Path | None = None,
        pieces: Sequence[tuple[str, float, int]] | None = None,
    ):
        """**Arguments:**

        - `model`: the content of a `.model` file.
        - `name`: its file, for error messages.
        - `bos_token`: the beginning-of-sequence token, if it differs from that of `model`.
        - `eos_token`, `eos_ids`: end-of-sequence tokens in addition to that of `model`.
        - `adds_bos`, `chat_template`, `tool_template`, `template_tokens`, `release_file`: as in `AbstractTokenizer`.
        - `pieces`: text, score and type of each token, if `model` was made from a GGUF file. `save` uses them to write
            a `tokenizer.json` too, unless the model normalises texts.

        **Raises:** `ValueError` if `model` is not a sentencepiece model, or lacks one of the given tokens.
        """
        types = checked_types(model, name)
        with as_input_error(name, f"{name} is not a sentencepiece model, or it is damaged"):
            self._processor = SentencePieceProcessor(model_proto=model)
            self._processor_without_prefix = SentencePieceProcessor(model_proto=model + _WITHOUT_PREFIX)
        self.name = name
        self.vocab = self._processor.vocab_size()
        bos_id = self._processor.bos_id() if bos_token is None else self._id(bos_token)
        self.bos_id = bos_id if bos_id >= 0 else None
        named = [] if eos_token is None else [self._id(eos_token)]
        self.eos_ids = tuple(dict.fromkeys(id for id in [*named, self._processor.eos_id(), *eos_ids] if id >= 0))
        self.adds_bos = adds_bos and self.bos_id is not None
        self.chat_template = chat_template
        self.tool_template = tool_template
        if template_tokens is not None:
            self.template_tokens = template_tokens
        self.release_file = release_file
        self._pieces = pieces
        with as_input_error(name, f"{name} is not a sentencepiece model, or it is damaged"):
            self._strips = self._processor.encode("a") != self._processor_without_prefix.encode("a")
        # An end-of-sequence token is a control token whatever its type, unless texts encode to it.
        eos = [
            id
            for id in self.eos_ids
            if id < self.vocab and (types[id] == USER_DEFINED or id not in self._encode(self.token_name(id), False))
        ]
        controls = {*eos, *(id for id, kind in enumerate(types) if kind == CONTROL)}
        self.control_tokens = {self._processor.id_to_piece(id): id for id in sorted(controls)}
        self.control_pattern = control_pattern([("", self.control_tokens, "")])

    def _id(self, token: str) -> int:
        id = self._processor.piece_to_id(token)
        if self._processor.id_to_piece(id) != token:
            raise InputError(
                f"The settings in the folder of {self.name} name the token {token!r}, which it does not have; "
                "use a folder that also has a tokenizer.json."
            )
        return id

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        return encode_as_text(self._encode, text, self.control_tokens, first=first)

    def _encode(self, text: str, first: bool) -> list[int]:
        with as_input_error(self.name, f"{self.name} cannot encode the text"):
            return (self._processor if first else self._processor_without_prefix).encode(text)

    def token_bytes(self, id: int, *, first: bool) -> bytes:
        piece = self._processor.id_to_piece(id)
        if self._processor.is_byte(id):
            return bytes([int(piece[3:-1], 16)])
        if self._processor.is_unknown(id):
            return self._processor.decode([id]).encode()
        if first and self._strips:
            piece = piece.removeprefix(_SPACE)
        return piece.replace(_SPACE, " ").encode()

    def vocabulary_metadata(self) -> dict[str, Any]:
        if not self._keeps_text():
            raise InputError(
                f"{self.name} changes texts before it splits them (NFKC, for example), which is not written to GGUF "
                "files; use another tokenizer.",
                file=self.name,
            )
        pieces = self._pieces or read_chunks(self._processor.serialized_model_proto(), self.name)
        return sentencepiece_metadata(pieces, space_prefix=self._strips)

    def _keeps_text(self) -> bool:
        """Whether nothing but spaces is changed in a text before it is split."""
        normalized = ((" " if self._strips else "") + _PROBE).replace(" ", _SPACE)
        return self._processor.normalize(_PROBE) == normalized

    def write_vocabulary(self, folder: Path) -> Mapping[str, Any]:
        # The version at the end of a release file's name is that of its chat format.
        version = self.release_file.name.rpartition(".model")[2] if self.release_file is not None else ""
        (folder / f"tokenizer.model{version}").write_bytes(self._processor.serialized_model_proto())
        all_bytes = sum(self._processor.is_byte(id) for id in range(self.vocab)) == 256
        if self._pieces is None or not all_bytes or not self._keeps_text():
            return {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": self._strips}
        # For the model type mistral, transformers would load the other file without the leading space.
        return HuggingFaceTokenizer(
            with_merges(self._pieces, add_prefix=self._strips),
            name=self.name,
            bos_id=self.bos_id,
            eos_ids=self.eos_ids,
            adds_bos=self.adds_bos,
        ).write_vocabulary(folder)


def read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Reads a `.model` file and the settings files in its folder.

    **Raises:** `ValueError` if a file is damaged, or the settings add tokens that do not fit the vocabulary.
    """
    settings = read_settings(path.parent)
    model = read_bytes(path, LARGEST)
    unknown = [kind for _, _, kind in read_chunks(model, str(path))].count(UNKNOWN)
    if unknown != 1:
        raise InputError(
            f"{path} is not a sentencepiece model, or it is damaged (it has {unknown} tokens for unknown words, not "
            "one); fetch it again.",
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
        tool_template=settings.tool_template,
        template_tokens=settings.template_tokens,
        release_file=path,
    )


def _added_pieces(model: bytes, settings: Settings, path: Path) -> bytes:
    """The tokens that the settings add to `model`, as bytes to append to it.

    **Raises:** `ValueError` if a token has another id in `model`, or if there is a gap in the ids.
    """
    tokens = [piece for piece, _, _ in read_chunks(model, str(path))] if settings.added_tokens else []
    added: list[tuple[str, float, int]] = []
    for text, id in sorted(settings.added_tokens.items(), key=lambda entry: entry[1]):
        if id == len(tokens) and text not in tokens:
            tokens.append(text)
            added.append((text, 0.0, CONTROL if text in settings.special_tokens else USER_DEFINED))
        elif not 0 <= id < len(tokens) or tokens[id] != text:
            raise InputError(
                f"The settings in {path.parent} give the token {shown(text)} the id {id}, and {path.name} does not; "
                "use a folder that also has a tokenizer.json.",
                file=path,
                key=text,
            )
    return write_pieces(added)
