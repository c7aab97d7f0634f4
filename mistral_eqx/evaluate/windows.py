"""The perplexity of a model on a text of any length, with sliding windows."""

import dataclasses
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..checks import CacheDType, Count, checked
from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from ..nn import Mistral
from .scoring import score


# A text is read in blocks of this many characters. Without a word boundary it is cut after this many blocks.
_BLOCK = 64 * 1024
_MOST_BLOCKS = 16


@runtime_checkable
class Tokenizer(Protocol):
    """The methods of a tokenizer that `perplexity` needs."""

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """The ids of a text."""
        ...

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        """The ids of a part of a text, without control tokens; `first` is `False` for a later part."""
        ...

    def token_bytes(self, id: int, *, first: bool) -> bytes:
        """The bytes of a token."""
        ...


@runtime_checkable
class Readable(Protocol):
    """A source of text, such as an open file."""

    def read(self, size: int, /) -> str:
        """The next characters, at most `size`; an empty string at the end."""
        ...


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The result of [`mistral_eqx.perplexity`][].

    **Attributes:**

    - `log_prob`: the sum of the log-probabilities of the scored tokens.
    - `tokens`: the number of scored tokens. The first token of a text is scored only if the tokenizer puts a special
        token before it.
    - `bytes`: the number of bytes of the scored tokens, in UTF-8.
    """

    log_prob: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability; infinity if it does not fit into a float."""
        mean = -self.log_prob / self.tokens
        return math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The mean number of bits per byte of the text; comparable between vocabularies."""
        return -self.log_prob / math.log(2) / self.bytes


def perplexity(
    model: Mistral,
    tokenizer: Tokenizer,
    text: str | Readable,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch: int = 1,
    cache_dtype: CacheDType | None = None,
    progress: Callable[[Perplexity], None] | None = None,
) -> Perplexity:
    """The perplexity of a model on a text of any length.

    ```python
    with open("book.txt", encoding="utf-8", newline="") as book:
        found = mx.perplexity(model, tokenizer, book, context=2048, stride=512)
    print(found.perplexity, found.bits_per_byte)
    ```

    Windows of `context` tokens start every `stride` tokens, as
    [Hugging Face defines it](https://huggingface.co/docs/transformers/perplexity). Each token is scored once, in the
    first window that has it, so that at least `context - stride` tokens come before it; tokens of the first window may
    have fewer. If `stride` is `context`, the first token of a window has no token before it and is not scored.

    A file is read, encoded and scored in parts, so that memory does not grow with it. A part ends before a space
    between two letters, where a token always ends. A text without such a space is cut every million characters.

    **Arguments:**

    - `model`: the model.
    - `tokenizer`: its tokenizer; a tokenizer that always adds a beginning of sequence adds it here too.
    - `text`: the text, or an open file.
    - `context`: the number of tokens in a window; the model's context unless given.
    - `stride`: the distance between the starts of two windows; half of `context` unless given. A smaller stride gives
        each token more context, and takes more time.
    - `batch`: the number of windows in a batch.
    - `cache_dtype`: as in [`mistral_eqx.generate`][]; each window is read through a KV cache.
    - `progress`: called with the result so far, after each batch.

    **Returns:** a [`mistral_eqx.Perplexity`][].

    **Raises:** `ValueError` if the text has fewer than two tokens, `context` is more than the model's, or `stride` is
    not from 1 to `context`.
    """
    context, stride = window_sizes(checked(model, Mistral, "model").config, context, stride)
    batch = checked(batch, Count, "batch")
    if not isinstance(text, str | Readable):
        raise InputError(f"The text is {shown(text)}; give a string, or a file that is open for reading text.")
    tokens = itertools.chain.from_iterable(encode_parts(tokenizer, text))
    found = Perplexity(0.0, 0, 0)
    windows = _windows(tokens, context, stride)
    while together := list(itertools.islice(windows, batch)):
        last = max(window.scored for window in together)
        scores = score(model, [window.ids for window in together], last=last, cache_dtype=cache_dtype)
        for window, row in zip(together, np.asarray(scores.log_probs, np.float64), strict=True):
            length = len(window.ids)
            found = Perplexity(
                found.log_prob + float(row[length - window.scored : length].sum()),
                found.tokens + window.scored,
                found.bytes + window.bytes,
            )
        if progress is not None:
            progress(found)
    return found


def window_sizes(config: MistralConfig, context: int | None, stride: int | None) -> tuple[int, int]:
    """The context and the stride of windows; those that are not given follow from the model.

    **Raises:** `ValueError` if the context is more than the model's, or the stride more than the context.
    """
    size: int = checked(config.max_positions if context is None else context, Count, "context")
    if not 2 <= size <= config.max_positions:
        raise InputError(
            f"context is {size}; it must be at least 2, and at most this model's context of "
            f"{config.max_positions} tokens.",
            key="context",
        )
    step: int = checked(size // 2 if stride is None else stride, Count, "stride")
    if step > size:
        raise InputError(
            f"stride is {step}; it must be at least 1, and at most the context of {size} tokens.", key="stride"
        )
    return size, step


class _Token(NamedTuple):
    id: int
    bytes: int


class _Window(NamedTuple):
    """The ids of a window, the number of scored ones at its end, and their bytes."""

    ids: list[int]
    scored: int
    bytes: int


def _windows(tokens: Iterator[_Token], context: int, stride: int) -> Iterator[_Window]:
    window = list(itertools.islice(tokens, context))
    new = len(window)
    while new:
        scored = min(new, len(window) - 1)
        if scored:
            yield _Window([token.id for token in window], scored, sum(token.bytes for token in window[-scored:]))
        more = list(itertools.islice(tokens, stride))
        window, new = [*window[stride:], *more], len(more)


def encode_parts(tokenizer: Tokenizer, text: str | Readable) -> Iterator[list[_Token]]:
    """The tokens of a text and the number of bytes of each, in parts.

    **Raises:** `ValueError`, before the first part, if the text has fewer than two tokens.
    """
    start = [_Token(id, 0) for id in tokenizer.encode("")]
    first = True
    for part in _parts(io.StringIO(text) if isinstance(text, str) else text):
        ids = tokenizer.encode(part, add_bos=False) if first else tokenizer.encode_plain(part, first=False)
        sizes = [len(tokenizer.token_bytes(id, first=first and at == 0)) for at, id in enumerate(ids)]
        tokens = [*start, *map(_Token, ids, sizes)]
        if first and len(tokens) < 2:
            raise InputError("The text has one token, and no token before it to predict it from; give a longer text.")
        yield tokens
        start, first = [], False
    if first:
        raise InputError("The text is empty; give a text of at least two tokens.")


def _parts(text: Readable) -> Iterator[str]:
    """A text in parts that end at word boundaries."""
    pending = ""
    while block := text.read(_BLOCK):
        if not isinstance(block, str):
            raise InputError("The file returns bytes, not text; open it in text mode, with encoding='utf-8'.")
        pending += block
        end = _last_word(pending) or (len(pending) if len(pending) >= _MOST_BLOCKS * _BLOCK else 0)
        if end:
            yield pending[:end]
            pending = pending[end:]
    if pending:
        yield pending


def _last_word(text: str) -> int:
    """The index of the last space between two letters; 0 if there is none.

    No token crosses this index: a token may join a space with the letters after it, never with those before it.
    """
    at = text.rfind(" ", 0, -1)
    while at > 0 and not (text[at - 1].isalpha() and text[at + 1].isalpha()):
        at = text.rfind(" ", 0, at)
    return max(at, 0)
