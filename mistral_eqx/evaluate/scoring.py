"""The log-likelihood of given sequences."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..checks import CacheDType, CountOrZero, checked
from ..errors import InputError
from ..generation.caches import empty_cache, parts, slots
from ..generation.finite import not_finite
from ..generation.prompt import Prompts, checked_prompts, pad_left
from ..generation.reading import CHUNK, check_chunk, place_rows, prompt_width, read_chunk
from ..nn import Cache, Mistral, Unembedding, log_likelihood
from ..parallel import gather_to_host, specs, spmd


class Scores(NamedTuple):
    """The result of [`mistral_eqx.score`][].

    **Attributes:**

    - `log_probs`: the log-probability of each token, given those before it in its row; 0 for the first token of a row,
        and past its length.
    - `greedy`: whether each token is the one that greedy decoding would choose: the most likely one, of equally likely
        ones the first. `False` for the first token of a row, and past its length.
    - `lengths`: the number of tokens of each row.
    """

    log_probs: Float[Array, "batch seq"]
    greedy: Bool[Array, "batch seq"]
    lengths: Int[Array, " batch"]


def score(
    model: Mistral,
    rows: Prompts,
    *,
    prefill_chunk: int = CHUNK,
    last: int | None = None,
    cache_dtype: CacheDType | None = None,
) -> Scores:
    """The log-likelihood of each token given those before it.

    ```python
    scores = mx.score(model, [tokenizer.encode("The capital of France is Paris.")])
    print(scores.log_probs.sum())
    ```

    Chunked prefill reads the rows into a KV cache, and [`mistral_eqx.nn.log_likelihood`][] goes through the vocabulary
    in blocks: the logits of a long row are never all in memory. If `vocab` is split, devices exchange a few numbers per
    token.

    **Arguments:**

    - `model`: the model.
    - `rows`: lists of token ids, of any lengths, or an array of shape `(batch, seq)`, in which -1 on either side is
        padding. A row has the same scores as it has alone. The last token of a row is never an input, so that a row may
        have one token more than the context.
    - `prefill_chunk`: the most tokens per row in one chunk; smaller chunks take less memory.
    - `last`: the number of tokens at the end of each row to score; all unless given. Earlier chunks skip the output
        head, and their `log_probs` are 0.
    - `cache_dtype`: as in [`mistral_eqx.generate`][].

    **Returns:** [`mistral_eqx.evaluate.Scores`][], as wide as the longest row.

    **Raises:** `ValueError` if a row is empty, has an id outside the vocabulary, or does not fit into the context, or
    if a logit is not finite.
    """
    sequences = checked_prompts(rows, checked(model, Mistral, "model").config.vocab)
    prefill_chunk = check_chunk(prefill_chunk, "prefill_chunk")
    last = checked(last, CountOrZero | None, "last")
    checked(cache_dtype, CacheDType | None, "cache_dtype")
    lengths, context = [len(sequence) for sequence in sequences], model.config.max_positions
    longest = max(lengths)
    if longest > context + 1:
        raise InputError(
            f"A row of {longest} tokens does not fit into this model's context of {context} tokens, to which the last "
            "token does not count; cut it, as mistral_eqx.perplexity does."
        )
    # Copies of the first row make the number of rows divisible by the devices that split `batch`.
    sequences += sequences[:1] * (-len(sequences) % parts(model, "batch"))
    width = prompt_width(longest - 1)
    ids, positions = pad_left([sequence[:-1] for sequence in sequences], width)
    targets, _ = pad_left([sequence[1:] for sequence in sequences], width)
    cache = empty_cache(model, len(sequences), slots(model, width), min(prefill_chunk, width), cache_dtype)
    scored = []
    for start in range(0, width, prefill_chunk):
        chunk = slice(start, min(start + prefill_chunk, width))
        chunk_ids, chunk_positions, chunk_targets = (place_rows(model, x[:, chunk]) for x in (ids, positions, targets))
        if last is not None and chunk.stop <= width - last:
            _, cache = read_chunk((model, chunk_ids, chunk_positions), cache)
        else:
            log_probs, greedy, cache = _score_chunk((model, chunk_ids, chunk_positions, chunk_targets), cache)
            scored.append((chunk, log_probs, greedy))
    log_probs, greedy = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool)
    for chunk, *found in scored:
        log_probs[:, chunk], greedy[:, chunk] = map(gather_to_host, found)
    log_probs, greedy = _aligned(log_probs, lengths), _aligned(greedy, lengths)
    if (wrong := np.argwhere(~np.isfinite(log_probs))).size:
        row, position = wrong[0].tolist()
        raise not_finite(f"token {position} of row {row}")
    return Scores(jnp.asarray(log_probs), jnp.asarray(greedy), jnp.asarray(lengths))


@eqx.filter_jit(donate="all-except-first")
def _score_chunk(
    kept: tuple[Mistral, Int[Array, "batch seq"], Int[Array, "batch seq"], Int[Array, "batch seq"]], cache: Cache
) -> tuple[Array, Array, Cache]:
    """Reads a chunk into the cache, and scores the target of each of its tokens."""
    model, ids, positions, targets = kept
    strategy = model.strategy

    def forward(model: Mistral, ids: Array, positions: Array, targets: Array, cache: Cache):
        hidden, cache = model.hidden(ids, positions, cache)
        embedding = model.embedding
        head = Unembedding(embedding.weight, embedding.strategy) if model.head is None else model.head
        found = log_likelihood(head, hidden, targets)
        return found.log_probs, found.likeliest, cache

    row_spec, cache_specs = strategy.spec("batch"), specs(cache, strategy)
    in_specs = specs(model, strategy), row_spec, row_spec, row_spec, cache_specs
    return spmd(forward, model.mesh, in_specs, (row_spec, row_spec, cache_specs))(model, ids, positions, targets, cache)


def _aligned(x: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Moves the scores at the end of each left-padded row to the columns of its tokens; the first token has none."""
    aligned = np.zeros((len(lengths), max(lengths)), x.dtype)
    for row, (values, length) in enumerate(zip(x, lengths, strict=False)):
        aligned[row, 1:length] = values[x.shape[1] - length + 1 :]
    return aligned
