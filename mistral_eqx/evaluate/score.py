"""How likely a model holds texts that are there already."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..checks import CountOrZero, checked
from ..errors import InputError
from ..generation.caches import empty_cache, parts, slots
from ..generation.finite import not_finite
from ..generation.prompt import Prompts, checked_prompts, pad_left
from ..generation.reading import CHUNK, check_chunk, place_rows, prompt_width, read_piece
from ..nn import Cache, Mistral, Unembedding, log_likelihood
from ..parallel import everywhere, specs, spmd


class Scores(NamedTuple):
    """What [`mistral_eqx.score`][] returns.

    **Attributes:**

    - `log_probs`: the logarithm of each token's probability, given those before it in its row; 0 for a row's first
        token, which has none, and past a row's length.
    - `greedy`: whether each token is the one that greedy decoding takes in its place: the likeliest, of equally likely
        ones the first. `False` where `log_probs` says nothing.
    - `lengths`: how many tokens each row has.
    """

    log_probs: Float[Array, "batch seq"]
    greedy: Bool[Array, "batch seq"]
    lengths: Int[Array, " batch"]


def score(model: Mistral, rows: Prompts, *, piece: int = CHUNK, last: int | None = None) -> Scores:
    """The log-likelihood of each token given those before it.

    ```python
    scores = mx.score(model, [tokenizer.encode("The capital of France is Paris.")])
    print(scores.log_probs.sum())
    ```

    Rows are read in pieces into a cache, and likelihoods come from parts of the vocabulary
    ([`mistral_eqx.nn.log_likelihood`][]): there is never a logit for each token of a long row. Where `vocab` is split,
    devices exchange a few numbers a token.

    **Arguments:**

    - `model`: the model.
    - `rows`: lists of token ids, of any lengths, or an array of shape `(batch, seq)`, in which -1 on either side is
        padding. Each gives what it would give alone. A row's last token is not read, so that a row may have one more
        than the context.
    - `piece`: the most tokens of each row that are read at a time; fewer take less memory.
    - `last`: only so many tokens at the end of each row are wanted. Pieces before them cost no output head, and
        are said to be 0.

    **Returns:** [`mistral_eqx.evaluate.Scores`][], as wide as the longest row.

    **Raises:** `ValueError` if a row is empty, has an id outside the vocabulary, or does not fit into the context; and
    if a logit is not finite.
    """
    texts = checked_prompts(rows, checked(model, Mistral, "model").config.vocab)
    piece = check_chunk(piece, "piece")
    last = checked(last, CountOrZero | None, "last")
    lengths, context = [len(text) for text in texts], model.config.max_positions
    longest = max(lengths)
    if longest > context + 1:
        raise InputError(
            f"A row of {longest} tokens does not fit into this model's context of {context} tokens, of which the last "
            "token needs none; cut it, as mistral_eqx.perplexity does."
        )
    # Copies of a row, so that `batch` can be split.
    texts += texts[:1] * (-len(texts) % parts(model, "batch"))
    width = prompt_width(longest - 1)
    ids, positions = pad_left([text[:-1] for text in texts], width)
    targets, _ = pad_left([text[1:] for text in texts], width)
    cache = empty_cache(model, len(texts), slots(model, width), min(piece, width))
    scored = []
    for start in range(0, width, piece):
        part = slice(start, min(start + piece, width))
        tokens, at, following = (place_rows(model, x[:, part]) for x in (ids, positions, targets))
        if last is not None and part.stop <= width - last:
            _, cache = read_piece((model, tokens, at), cache)
        else:
            log_probs, greedy, cache = _read((model, tokens, at, following), cache)
            scored.append((part, log_probs, greedy))
    log_probs, greedy = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool)
    for part, *found in scored:
        log_probs[:, part], greedy[:, part] = map(everywhere, found)
    log_probs, greedy = _aligned(log_probs, lengths), _aligned(greedy, lengths)
    if (wrong := np.argwhere(~np.isfinite(log_probs))).size:
        row, position = wrong[0].tolist()
        raise not_finite(f"token {position} of row {row}")
    return Scores(jnp.asarray(log_probs), jnp.asarray(greedy), jnp.asarray(lengths))


@eqx.filter_jit(donate="all-except-first")
def _read(
    kept: tuple[Mistral, Int[Array, "batch seq"], Int[Array, "batch seq"], Int[Array, "batch seq"]], cache: Cache
) -> tuple[Array, Array, Cache]:
    """Reads tokens into the cache, and scores those that come after each of them."""
    model, ids, positions, targets = kept
    strategy = model.strategy

    def forward(model: Mistral, ids: Array, positions: Array, targets: Array, cache: Cache):
        hidden, cache = model.hidden(ids, positions, cache)
        embedding = model.embedding
        head = Unembedding(embedding.weight, embedding.strategy) if model.head is None else model.head
        found = log_likelihood(head, hidden, targets)
        return found.log_probs, found.likeliest, cache

    rows, layers = strategy.spec("batch"), specs(cache, strategy)
    in_specs = specs(model, strategy), rows, rows, rows, layers
    return spmd(forward, model.mesh, in_specs, (rows, rows, layers))(model, ids, positions, targets, cache)


def _aligned(x: np.ndarray, lengths: list[int]) -> np.ndarray:
    """What stands at the end of each row for all its tokens but the first, in the columns of these tokens."""
    aligned = np.zeros((len(lengths), max(lengths)), x.dtype)
    for row, (values, length) in enumerate(zip(x, lengths, strict=False)):
        aligned[row, 1:length] = values[x.shape[1] - length + 1 :]
    return aligned
