"""A prefix cache: the beginning that many prompts share, prefilled once."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from ..checks import CacheDType, checked
from ..errors import InputError
from ..nn import Cache, Mistral
from .caches import empty_cache, parts, slots
from .prompt import checked_prompts, pad_left
from .reading import CHUNK, check_chunk, check_context, prompt_width, read_chunks


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The result of [`mistral_eqx.prefill`][]: a beginning that many prompts share, with its keys and values.

    **Attributes:**

    - `ids`: its tokens.
    - `model`: the model that prefilled it.
    - `cache`: their keys and values, in one row on each of the devices among which `batch` is split.
    """

    ids: tuple[int, ...]
    model: Mistral
    cache: Cache


def prefill(
    model: Mistral,
    prefix: Sequence[int] | np.ndarray | Int[Array, " _"],
    *,
    prefill_chunk: int = CHUNK,
    cache_dtype: CacheDType | None = None,
) -> Prefix:
    """Prefills a beginning that many prompts share.

    ```python
    prefix = mx.prefill(model, tokenizer.encode(instructions))
    out = mx.generate(model, [tokenizer.encode(question, add_bos=False)], max_new_tokens=64, prefix=prefix)
    ```

    **Arguments:**

    - `model`: the model.
    - `prefix`: token ids.
    - `prefill_chunk`: the size of prefill chunks in tokens; smaller chunks take less memory.
    - `cache_dtype`: as in [`mistral_eqx.generate`][].

    **Returns:** a [`mistral_eqx.Prefix`][], which can be used any number of times.

    **Raises:** `ValueError` if the prefix is empty, has an id outside the vocabulary, or fills the context; if
        `cache_dtype` is not one of these.
    """
    (row,) = checked_prompts([prefix], checked(model, Mistral, "model").config.vocab)
    check_context(len(row), 1, model.config.max_positions)
    prefill_chunk = check_chunk(prefill_chunk)
    checked(cache_dtype, CacheDType | None, "cache_dtype")
    rows = parts(model, "batch")
    ids, positions = pad_left([row] * rows, prompt_width(len(row)))
    cache = empty_cache(model, rows, slots(model, ids.shape[1]), cache_dtype=cache_dtype)
    _, cache = read_chunks(model, ids, positions, cache, prefill_chunk)
    return Prefix(tuple(row), model, cache)


def checked_prefix(prefix: Prefix, model: Mistral, cache_dtype: CacheDType | None) -> tuple[int, ...]:
    """The tokens of a prefix.

    **Raises:** `ValueError` if it belongs to another model, or its cache has not the `cache_dtype` that is given.
    """
    if prefix.model is not model:
        raise InputError("The prefix belongs to another model; make one with this model, by mistral_eqx.prefill.")
    if cache_dtype not in (None, prefix.cache.cache_dtype):
        raise InputError(
            f"cache_dtype is {cache_dtype!r}, but the prefix's cache has {prefix.cache.cache_dtype or 'floats'}; give "
            "the same cache_dtype to mistral_eqx.prefill, or leave it out here."
        )
    return prefix.ids
