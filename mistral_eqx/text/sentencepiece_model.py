"""Reads, checks and writes the file format of sentencepiece."""

import functools
import math
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from ..documents import shown
from ..errors import InputError
from .libraries import as_input_error


# The types of tokens. GGUF uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Field numbers in sentencepiece_model.proto, and the number of the model type BPE.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK, _BPE = 3, 35, 2
_CHARSMAP, _ADD_PREFIX, _REMOVE_SPACES = 2, 3, 4

_BYTE_NAME = re.compile("<0x[0-9A-Fa-f]{2}>")
# The longest tokens in use are runs of some hundred spaces or dashes.
_LONGEST = 4096


def write_model(
    pieces: Iterable[tuple[str, float, int]],
    *,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    precompiled_charsmap: bytes,
) -> bytes:
    """The content of a `.model` file with the model type BPE.

    **Arguments:**

    - `pieces`: text, score and type of each token.
    - `add_dummy_prefix`: whether a text gets a leading space.
    - `remove_extra_whitespaces`: whether a run of spaces becomes one space.
    - `precompiled_charsmap`: character replacements in sentencepiece's own format.

    **Returns:** a protobuf message.
    """
    pieces = list(pieces)
    # The library requires all 256 byte tokens or none.
    byte_fallback = sum(kind == BYTE for _, _, kind in pieces) == 256
    message = write_pieces(pieces)
    message += _bytes(_TRAINER, _int(_MODEL_TYPE, _BPE) + _int(_BYTE_FALLBACK, byte_fallback))
    return message + _bytes(
        _NORMALIZER,
        _bytes(_CHARSMAP, precompiled_charsmap)
        + _int(_ADD_PREFIX, add_dummy_prefix)
        + _int(_REMOVE_SPACES, remove_extra_whitespaces),
    )


def write_pieces(pieces: Iterable[tuple[str, float, int]]) -> bytes:
    """Encodes tokens in the format of a `.model` file. Appended to such a file, they extend its vocabulary.

    **Arguments:**

    - `pieces`: text, score and type of each token.
    """
    return b"".join(
        _bytes(_PIECES, _bytes(_PIECE, text.encode()) + _float(_SCORE, score) + _int(_TYPE, kind))
        for text, score, kind in pieces
    )


@functools.lru_cache(maxsize=1)
def read_chunks(model: bytes, name: str) -> tuple[tuple[str, float, int], ...]:
    """Text, score and type of each token in a `.model` file. The result for the last file is cached.

    **Arguments:**

    - `model`: the file's content.
    - `name`: the name of the file, for error messages.

    **Raises:** `ValueError` if the file is damaged.
    """
    pieces: list[tuple[str, float, int]] = []
    with as_input_error(name, f"{name} is not a sentencepiece model, or it is damaged"):
        for field, content in _fields(model):
            if field == _PIECES:
                entries = dict(_fields(bytes(content)))
                (score,) = struct.unpack("<f", entries.get(_SCORE, bytes(4)))
                pieces.append((entries.get(_PIECE, b"").decode(), score, entries.get(_TYPE, NORMAL)))
    return tuple(pieces)


def checked_types(model: bytes, name: str) -> list[int]:
    """The type of each token in a `.model` file.

    **Raises:** `ValueError` if its tokens are not a valid vocabulary.
    """
    pieces = read_chunks(model, name)
    complaint = None
    if not pieces:
        complaint = "it has no tokens"
    elif not any(kind in (NORMAL, USER_DEFINED, BYTE) for _, _, kind in pieces):
        complaint = "none of its tokens is text"
    for id, (text, score, kind) in enumerate(pieces):
        if not NORMAL <= kind <= BYTE:
            complaint = f"its token {id} has the type {kind}"
        elif kind == BYTE and not _BYTE_NAME.fullmatch(text):
            complaint = f"its byte token {id} has the text {shown(text)}"
        elif not math.isfinite(score):
            complaint = f"its token {id} has the score {score}"
        elif "\0" in text:
            complaint = f"its token {id} has the character NUL"
        elif len(text) > _LONGEST:
            complaint = f"its token {id} has {len(text)} characters"
    if complaint:
        raise InputError(
            f"{name} is not a sentencepiece model, or it is damaged ({complaint}); fetch it again.", file=name
        )
    return [kind for _, _, kind in pieces]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message. The value of a varint field is a number, of others bytes.

    **Raises:** `ValueError` or `IndexError` if the message is damaged.
    """
    at = 0
    while at < len(message):
        key, at = (message[at], at + 1) if message[at] < 0x80 else _read_varint(message, at)
        field, wire = key >> 3, key & 7
        if wire in (0, 2):
            value, at = (message[at], at + 1) if message[at] < 0x80 else _read_varint(message, at)
        else:
            value = {1: 8, 5: 4}.get(wire)
        if wire == 0:
            yield field, value
            continue
        if value is None or at + value > len(message):
            raise ValueError(f"the field at byte {at} is invalid or truncated")
        yield field, message[at : at + value]
        at += value


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte, at = message[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"the number before byte {at} is too long")


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """A number as a protobuf varint: seven bits a byte, least significant first; the eighth bit marks continuation."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
