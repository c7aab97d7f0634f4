"""Prompts of many lengths in one array."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Int

from ..documents import shown
from ..errors import InputError


Prompts: TypeAlias = (
    str | Sequence[str | Sequence[int] | np.ndarray | Int[Array, " _"]] | np.ndarray | Int[Array, "batch seq"]
)


@runtime_checkable
class Encoder(Protocol):
    """What makes token ids of a text."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, its beginning of sequence included."""
        ...


def bucket(length: int, *, step: int, per_octave: int) -> int:
    """The least of a few sizes that holds `length`, so that many lengths share a compiled program.

    **Arguments:**

    - `length`: what must fit.
    - `step`: the first size, and the least distance from one to the next; a power of two.
    - `per_octave`: how many sizes there are at most from one power of two to the next; a power of two.

    **Returns:** `length` or more: less than `step`, or less than `1 / per_octave` of it, is unused.
    """
    octave = 2 ** max(length - 1, 1).bit_length() // 2
    step = max(step, octave // per_octave)
    return max(-(-length // step), 1) * step


def checked_prompts(prompts: Prompts, vocab: int, tokenizer: Encoder | None = None) -> list[list[int]]:
    """The prompts as lists of ids.

    **Arguments:**

    - `prompts`: lists of ids, texts, or one text; or an array of two dimensions, in which -1 on either side of a row is
        padding.
    - `tokenizer`: makes ids of texts.

    **Raises:** `ValueError` if there is none, one is empty or no list of integers, an id is outside the vocabulary, or
    one is a text and there is no tokenizer.
    """
    if isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim == 2:
        prompts = [_without_padding(row) for row in np.asarray(prompts)]
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise InputError(f"The prompts are {shown(prompts)}; give a list of lists of token ids, as a tokenizer makes.")
    rows = [_checked_prompt(number, prompt, vocab, tokenizer) for number, prompt in enumerate(prompts)]
    if not rows:
        raise InputError("There is no prompt; give at least one list of token ids.")
    return rows


def _without_padding(row: np.ndarray) -> np.ndarray:
    tokens = np.flatnonzero(row != -1)
    return row[tokens[0] : tokens[-1] + 1] if tokens.size else row[:0]


def _checked_prompt(number: int, prompt: Any, vocab: int, tokenizer: Encoder | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError(
                f"Prompt {number} is the text {shown(prompt)}; encode it with the model's tokenizer, or "
                "give generate and stream the tokenizer (tokenizer=...), without a prefix."
            )
        prompt = tokenizer.encode(prompt)
    try:
        row = np.asarray(prompt)
        # numpy takes True among integers for 1.
        if isinstance(prompt, list | tuple) and any(isinstance(id, bool | np.bool_) for id in prompt):
            row = None
    except (ValueError, TypeError):  # lists of several lengths in one
        row = None
    if row is not None and row.size == 0:
        raise InputError(
            f"Prompt {number} is empty; give at least one token id, such as the tokenizer's beginning of sequence."
        )
    if row is None or row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise InputError(f"Prompt {number} is {shown(prompt)}, but it must be a flat list of token ids.")
    if row.min() < 0 or row.max() >= vocab:
        wrong = int(row[(row < 0) | (row >= vocab)][0])
        raise InputError(
            f"Prompt {number} has the token id {wrong}, outside the vocabulary of {vocab}; "
            "was it made by another model's tokenizer?"
        )
    return row.tolist()


def pad_left(
    rows: Sequence[Sequence[int]], length: int, starts: Sequence[int] | None = None
) -> tuple[Int[np.ndarray, "batch seq"], Int[np.ndarray, "batch seq"]]:
    """One array on the host for rows of several lengths, which end together.

    **Arguments:**

    - `rows`: token ids.
    - `length`: the width of the result.
    - `starts`: the position of each row's first token; 0 unless given.

    **Returns:** ids and positions, both of shape `(batch, length)`; the position of padding is -1.
    """
    ids = np.zeros((len(rows), length), np.int32)
    positions = np.full((len(rows), length), -1, np.int32)
    for index, row in enumerate(rows):
        first = length - len(row)
        ids[index, first:] = row
        positions[index, first:] = np.arange(len(row)) + (starts[index] if starts else 0)
    return ids, positions
