"""The beginning of many texts, read once."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from ..checks import checked
from ..errors import InputError
from ..nn import Cache, Mistral
from .caches import empty_cache, parts, slots
from .prompt import checked_prompts, pad_left
from .reading import CHUNK, check_chunk, check_context, prompt_width, read_chunks


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The beginning of many texts, read once: what [`mistral_eqx.prefill`][] returns.

    **Attributes:**

    - `ids`: its tokens.
    - `model`: which read it.
    - `cache`: their keys and values, in one row on each of the devices among which `batch` is split.
    """

    ids: tuple[int, ...]
    model: Mistral
    cache: Cache


def prefill(
    model: Mistral, prefix: Sequence[int] | np.ndarray | Int[Array, " _"], *, prefill_chunk: int = CHUNK
) -> Prefix:
    """Reads the beginning of many texts, so that each of them can go on from there.

    ```python
    prefix = mx.prefill(model, tokenizer.encode(instructions))
    out = mx.generate(model, [tokenizer.encode(question, add_bos=False)], max_new_tokens=64, prefix=prefix)
    ```

    **Arguments:**

    - `model`: the model.
    - `prefix`: token ids.
    - `prefill_chunk`: the most tokens that are read at a time; fewer take less memory.

    **Returns:** a [`mistral_eqx.Prefix`][], which may be used any number of times.

    **Raises:** `ValueError` if the prefix is empty, has an id outside the vocabulary, or fills the context.
    """
    (row,) = checked_prompts([prefix], checked(model, Mistral, "model").config.vocab)
    check_context(len(row), 1, model.config.max_positions)
    prefill_chunk = check_chunk(prefill_chunk)
    rows = parts(model, "batch")
    ids, positions = pad_left([row] * rows, prompt_width(len(row)))
    cache = empty_cache(model, rows, slots(model, ids.shape[1]))
    _, cache = read_chunks(model, ids, positions, cache, prefill_chunk)
    return Prefix(tuple(row), model, cache)


def checked_prefix(prefix: Prefix, model: Mistral) -> tuple[int, ...]:
    """The tokens of a prefix.

    **Raises:** `ValueError` if another model read it.
    """
    if prefix.model is not model:
        raise InputError("The prefix was read by another model; read it again with this one, by mistral_eqx.prefill.")
    return prefix.ids
