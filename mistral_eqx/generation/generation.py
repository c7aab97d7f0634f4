"""Continuations of prompts."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ..checks import CacheDType, checked
from ..nn import Mistral
from ..parallel import gather_to_host
from .prefix import Prefix
from .prompt import Prompts, checked_prompts
from .proposals import Speculate
from .reading import CHUNK
from .request import Request
from .sampler import Sampler
from .speculation import Acceptance, Speculation
from .stops import Tokenizer, stop_rows


# With stop strings, the loop ends after so many tokens, to look for the strings in the text.
_STRIDE = 8


class Generated(NamedTuple):
    """The result of [`mistral_eqx.generate`][].

    **Attributes:**

    - `tokens`: new token ids; a row that ended early repeats its last token.
    - `lengths`: the number of valid tokens of each row, the end token included.
    - `texts`: the text of each row, if a tokenizer was given. It continues the prompt's text, its first space included,
        and leaves out the stop string.
    - `log_probs`: each token's log-probability, 0 past a row's length; if `logprobs` was given.
    - `top_tokens`, `top_log_probs`: the likeliest tokens at each step, likeliest first.
    - `acceptance`: what came of proposed tokens, with `speculate`.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    texts: list[str] | None = None
    log_probs: Float[Array, "batch new"] | None = None
    top_tokens: Int[Array, "batch new top"] | None = None
    top_log_probs: Float[Array, "batch new top"] | None = None
    acceptance: Acceptance | None = None


def generate(
    model: Mistral,
    prompts: Prompts,
    *,
    max_new_tokens: int | None = None,
    sampler: Sampler | None = None,
    eos_id: int | Sequence[int] | None = None,
    key: Key[Array, "..."] | None = None,
    stop: str | Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    num_samples: int = 1,
    logprobs: int | None = None,
    prefix: Prefix | None = None,
    prefill_chunk: int = CHUNK,
    cache_dtype: CacheDType | None = None,
    speculate: Speculate | None = None,
) -> Generated:
    """Continues each prompt, in one compiled loop.

    ```python
    model, tokenizer = mx.from_pretrained("smollm2-135m")
    out = mx.generate(model, "The capital of France is", tokenizer=tokenizer)
    print(out.texts[0])
    ```

    Each row gives the tokens that it would give alone, whatever the other rows.

    **Arguments:**

    - `model`: the model.
    - `prompts`: lists of token ids, of any lengths; or texts, or one text, with a `tokenizer`; or an array of shape
        `(batch, seq)`, in which -1 on either side is padding.
    - `max_new_tokens`: the most new tokens of each; by default 256, or as many as the context has room for.
    - `sampler`: how a token is chosen; by default greedy.
    - `eos_id`: the token, or the tokens, that end a row; by default those of the model's config, `()` for none.
    - `key`: for samplers that draw: one key, from which each row derives its own, or an array with one key a prompt.
    - `stop`: strings that end a row as soon as its new text contains one, also in the middle of a token. A string may
        contain the name of a control token.
    - `tokenizer`: decodes the new tokens, and encodes prompts that are texts; needed for `stop`.
    - `num_samples`: how many continuations to draw of each prompt, after one prefill; they are next to each other in
        the result.
    - `logprobs`: how many likeliest tokens to report at each step with their log-probabilities; 0 reports only the
        chosen tokens'. They are the model's own, before processors and sampler.
    - `prefix`: from [`mistral_eqx.prefill`][]; the prompts continue it.
    - `prefill_chunk`: the size of prefill chunks in tokens; smaller chunks take less memory.
    - `cache_dtype`: `"int8"` or `"float8_e4m3"` for a KV cache that is rounded to 8 bits; by default it has the model's
        precision, or that of `prefix`.
    - `speculate`: [`mistral_eqx.PromptLookup`][] or [`mistral_eqx.Draft`][], which propose tokens that the model checks
        several at a time. The tokens are the same; not with `logprobs`.

    **Returns:** [`mistral_eqx.Generated`][], with `tokens` of shape `(batch * num_samples, max_new_tokens)` and
    `lengths` of shape `(batch * num_samples,)`.

    **Raises:** `ValueError` if a prompt is empty, has an id outside the vocabulary, or does not fit into the context
    with its new tokens; if an end token is outside the vocabulary; if a sampler draws and there is no key; if a stop
    string is empty; if there is no tokenizer for a text or a stop string; if a processor does not fit the vocabulary or
    forbids every token; if `cache_dtype` is not one of these, or not that of `prefix`; if a draft has another
    vocabulary or is on other devices; if a logit of a row that has not ended is not finite.
    """
    vocab = checked(model, Mistral, "model", remedy="mistral_eqx.nn.unstack or in_stages makes one").config.vocab
    # A prefix has the beginning of sequence, which a tokenizer would write again.
    rows = checked_prompts(prompts, vocab, tokenizer if prefix is None else None)
    request = Request.init(
        model,
        rows,
        max_new_tokens,
        Sampler() if sampler is None else sampler,
        eos_id,
        key,
        num_samples=num_samples,
        logprobs=logprobs,
        prefix=prefix,
        prefill_chunk=prefill_chunk,
        cache_dtype=cache_dtype,
        speculate=speculate,
    )
    before = [row for row in rows for _ in range(num_samples)]
    count = len(before)
    stops = stop_rows(stop, tokenizer, before)
    max_new_tokens = request.max_new_tokens
    size = max_new_tokens if stops is None else _STRIDE
    decoding, cache = collections.deque(request.steps(*request.start(rows), size, stops), maxlen=1).pop()
    lengths = gather_to_host(decoding.lengths)[:count]
    if stops is not None:
        lengths = np.where(stops.lengths < 0, lengths, stops.lengths).astype(np.int32)
    columns = np.minimum(np.arange(max_new_tokens), lengths[:, None] - 1)
    tokens = np.take_along_axis(gather_to_host(decoding.tokens)[:count], columns, axis=1)
    texts = None
    if stops is not None:
        texts = stops.flush()
    elif tokenizer is not None:
        texts = [
            tokenizer.decode(row[:length], after=prompt)
            for row, length, prompt in zip(tokens, lengths, before, strict=True)
        ]
    acceptance = cache.acceptance if isinstance(cache, Speculation) else None
    out = Generated(jnp.asarray(tokens), jnp.asarray(lengths), texts, acceptance=acceptance)
    if decoding.log_probs is None:
        return out
    past = np.arange(max_new_tokens) >= lengths[:, None]
    chosen, top_tokens, top = (
        gather_to_host(x)[:count]
        for x in (decoding.log_probs.chosen, decoding.log_probs.tokens, decoding.log_probs.top)
    )
    return out._replace(
        log_probs=jnp.asarray(np.where(past, 0, np.take_along_axis(chosen, columns, axis=1))),
        top_tokens=jnp.asarray(
            np.where(past[..., None], 0, np.take_along_axis(top_tokens, columns[..., None], axis=1))
        ),
        top_log_probs=jnp.asarray(np.where(past[..., None], 0, np.take_along_axis(top, columns[..., None], axis=1))),
    )
