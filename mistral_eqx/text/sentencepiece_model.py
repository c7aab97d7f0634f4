"""Writes the file format of sentencepiece, so that its library can run a vocabulary that came another way."""

import struct
from collections.abc import Iterable


# The types of tokens, which GGUF numbers alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Numbers of the fields in sentencepiece_model.proto, and of BPE among the kinds of model.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK, _BPE = 3, 35, 2
_CHARSMAP, _ADD_PREFIX, _REMOVE_SPACES = 2, 3, 4


def write_model(
    pieces: Iterable[tuple[str, float, int]],
    *,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    precompiled_charsmap: bytes,
) -> bytes:
    """The content of a `.model` file of the BPE kind.

    **Arguments:**

    - `pieces`: text, score and type of each token.
    - `add_dummy_prefix`: whether a text gets a space in front.
    - `remove_extra_whitespaces`: whether runs of spaces become one.
    - `precompiled_charsmap`: replacements of characters, in sentencepiece's own form.

    **Returns:** a protobuf message.
    """
    pieces = list(pieces)
    # The library wants all 256 byte tokens or none.
    byte_fallback = sum(kind == BYTE for _, _, kind in pieces) == 256
    message = b"".join(
        _bytes(_PIECES, _bytes(_PIECE, text.encode()) + _float(_SCORE, score) + _int(_TYPE, kind))
        for text, score, kind in pieces
    )
    message += _bytes(_TRAINER, _int(_MODEL_TYPE, _BPE) + _int(_BYTE_FALLBACK, byte_fallback))
    return message + _bytes(
        _NORMALIZER,
        _bytes(_CHARSMAP, precompiled_charsmap)
        + _int(_ADD_PREFIX, add_dummy_prefix)
        + _int(_REMOVE_SPACES, remove_extra_whitespaces),
    )


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the least first; all but the last byte have the eighth bit set."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
