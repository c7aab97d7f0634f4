"""Chunked prefill: prompts are read into a cache, a chunk at a time."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ..checks import Count, checked
from ..errors import InputError
from ..nn import Cache, Mistral
from ..parallel import put_on_mesh, specs, spmd
from .prompt import bucket


# The default size of prefill chunks in tokens: attention scores take memory for so many queries at a time.
CHUNK = 512


@eqx.filter_jit(donate="all-except-first")
def read_chunk(
    kept: tuple[Mistral, Int[Array, "batch seq"], Int[Array, "batch seq"]], cache: Cache, parts: int = 1
) -> tuple[Array, Cache]:
    """Reads tokens into the cache.

    **Arguments:**

    - `kept`: the model, token ids and their positions (-1 for padding).
    - `cache`: donated; it must have as many free slots as there are columns of ids.
    - `parts`: as for `Mistral.prefill`.

    **Returns:** the logits after the last column, shape `(batch, vocab)`, and the cache.
    """
    model, ids, positions = kept

    def forward(model: Mistral, ids: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        hidden, cache = model.prefill(ids, positions, cache, parts)
        return model.logits(hidden)[:, 0], cache

    strategy = model.strategy
    rows, layers = strategy.spec("batch"), specs(cache, strategy)
    in_specs, out_specs = (specs(model, strategy), rows, rows, layers), (strategy.spec("batch vocab"), layers)
    return spmd(forward, model.mesh, in_specs, out_specs)(model, ids, positions, cache)


def read_chunks(
    model: Mistral, ids: Int[np.ndarray, "rows seq"], positions: Int[np.ndarray, "rows seq"], cache: Cache, chunk: int
) -> tuple[Array, Cache]:
    """Reads tokens into a cache, at most `chunk` columns at a time, and returns the last logits and the cache."""
    if model.strategy.axes("layers"):
        # Chunks follow one another through the stages in one pass.
        count = next(count for count in range(-(-ids.shape[1] // chunk), ids.shape[1] + 1) if not ids.shape[1] % count)
        return read_chunk((model, place_rows(model, ids), place_rows(model, positions)), cache, count)
    # Devices that share the tokens of a pass hold a chunk each.
    chunk *= model.prefill_devices(cache)
    *earlier, last = (slice(start, start + chunk) for start in range(0, ids.shape[1], chunk))
    for part in earlier:
        _, cache = read_chunk((model, place_rows(model, ids[:, part]), place_rows(model, positions[:, part])), cache)
    return read_chunk((model, place_rows(model, ids[:, last]), place_rows(model, positions[:, last])), cache)


def place_rows(model: Mistral, x: np.ndarray | Array, dims: str = "batch") -> Array:
    """Shards an array with one entry a row as the model's rows are, and as its other `dims` are."""
    mesh = model.mesh
    return jnp.asarray(x) if mesh is None else put_on_mesh(np.asarray(x), mesh, model.strategy.spec(dims))


def check_chunk(chunk: int, name: str = "prefill_chunk") -> int:
    """Checks the size of a chunk.

    **Raises:** `ValueError` that names the argument, if it is below 1.
    """
    return checked(chunk, Count, name, remedy="a prompt is read so many tokens at a time")


def check_context(longest: int, max_new_tokens: int, context: int):
    """Refuses prompts of at most `longest` tokens that do not fit into the context with their new tokens.

    **Raises:** `ValueError` that has the three numbers.
    """
    if longest + max_new_tokens > context:
        raise InputError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones are more than this model's context of "
            f"{context} tokens; shorten the prompt or ask for fewer new tokens."
        )


def prompt_width(longest: int) -> int:
    """The padded width of prompts of at most `longest` tokens.

    Less than an eighth of them, or less than 16, are padding.
    """
    return bucket(longest, step=16, per_octave=8)
