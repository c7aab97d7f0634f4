"""How well a model foretells a text of any length, by windows that slide over it."""

import dataclasses
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..checks import Count, checked
from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from ..nn import Mistral
from .score import score


# A text is read and encoded so many characters at a time, and where it has no words, at most so many blocks.
_BLOCK = 64 * 1024
_MOST_BLOCKS = 16


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer, as the measuring of texts sees it."""

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Turns text into token ids."""
        ...

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        """The ids of a text, or of a part that goes on with one."""
        ...

    def token_bytes(self, id: int, *, first: bool) -> bytes:
        """The bytes that a token stands for."""
        ...


@runtime_checkable
class Readable(Protocol):
    """Where text comes from, such as an open file."""

    def read(self, size: int, /) -> str:
        """The next characters, at most so many; none at the end."""
        ...


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model foretells a text: what [`mistral_eqx.perplexity`][] returns.

    **Attributes:**

    - `log_prob`: the sum of the logarithms of the tokens' probabilities.
    - `tokens`: how many were scored. The first one of a text is not, for nothing comes before it, unless the
        tokenizer puts a token of its own there.
    - `bytes`: what these stand for, in UTF-8.
    """

    log_prob: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """The inverse of the tokens' probability, their geometric mean; infinity if it is beyond a float."""
        mean = -self.log_prob / self.tokens
        return math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The mean number of bits that a byte takes if the model compresses the text; whatever its vocabulary."""
        return -self.log_prob / math.log(2) / self.bytes


def perplexity(
    model: Mistral,
    tokenizer: Tokenizer,
    text: str | Readable,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch: int = 1,
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
    first window that has it, so that at least `context - stride` tokens come before it; but those of the first window
    have what there is. Where `stride` is `context`, nothing comes before a window's first token, which is not scored.

    A file is read, encoded and scored piece by piece: memory does not grow with it. It is cut before a space between
    two letters, where tokens end in any case; a text without such a place is cut every million characters.

    **Arguments:**

    - `model`: the model.
    - `tokenizer`: its tokenizer, which adds a beginning of text if it always does.
    - `text`: the text, or an open file.
    - `context`: tokens of a window; the model's context unless given.
    - `stride`: from one window's start to the next's; half of `context` unless given. Fewer mean more context for
        each token, and more work.
    - `batch`: how many windows are read together.
    - `progress`: called with what was measured so far, after each batch.

    **Returns:** a [`mistral_eqx.Perplexity`][].

    **Raises:** `ValueError` if the text has less than two tokens, `context` is more than the model's, or `stride` is
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
        scores = score(model, [window.ids for window in together], last=max(window.scored for window in together))
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
    """The sizes of windows, where they are not given those of the model.

    **Raises:** `ValueError` if they do not fit together, or not into the model.
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
    """The tokens of a window, how many of the last are scored in it, and their bytes."""

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
    """The tokens of a text and how many bytes each is, part by part.

    **Raises:** `ValueError`, before there is anything, if the text has less than two tokens.
    """
    start = [_Token(id, 0) for id in tokenizer.encode("")]
    first = True
    for part in _parts(io.StringIO(text) if isinstance(text, str) else text):
        ids = tokenizer.encode(part, add_bos=False) if first else tokenizer.encode_plain(part, first=False)
        sizes = [len(tokenizer.token_bytes(id, first=first and at == 0)) for at, id in enumerate(ids)]
        tokens = [*start, *map(_Token, ids, sizes)]
        if first and len(tokens) < 2:
            raise InputError("The text has one token, and nothing before it to foretell it from; give a longer one.")
        yield tokens
        start, first = [], False
    if first:
        raise InputError("The text is empty; give one of at least two tokens.")


def _parts(text: Readable) -> Iterator[str]:
    """A text in parts that end where words do."""
    held = ""
    while block := text.read(_BLOCK):
        if not isinstance(block, str):
            raise InputError("The file gives bytes, not text; open it as text, with encoding='utf-8'.")
        held += block
        end = _last_word(held) or (len(held) if len(held) >= _MOST_BLOCKS * _BLOCK else 0)
        if end:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _last_word(text: str) -> int:
    """Where the last word begins that comes after a word and a space, the space included; 0 if there is none.

    Tokens never reach across: a space goes with the letters after it, and with no letters before.
    """
    at = text.rfind(" ", 0, -1)
    while at > 0 and not (text[at - 1].isalpha() and text[at + 1].isalpha()):
        at = text.rfind(" ", 0, at)
    return max(at, 0)
