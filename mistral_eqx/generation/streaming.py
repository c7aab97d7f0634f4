"""Tokens as they are decoded."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from ..checks import CacheDType, checked
from ..nn import Mistral
from ..parallel import gather_to_host
from .caches import capacity, first_room, grow, slots
from .loop import Decoding
from .prefix import Prefix
from .prompt import Prompts, checked_prompts, pad_left
from .proposals import Speculate, checked_speculate
from .reading import CHUNK, prompt_width
from .request import Cached, Request
from .sampler import Sampler
from .speculation import Acceptance, Speculation
from .stops import Stops, Tokenizer, stop_rows


class Stream(Generator[np.ndarray, None, None]):
    """The tokens of a call of [`mistral_eqx.stream`][], as they are decoded.

    **Attributes:**

    - `acceptance`: what came of proposed tokens so far, with `speculate`.
    """

    acceptance: Acceptance | None

    def __init__(self, request: Request, rows: list[list[int]], stops: Stops | None):
        self.acceptance = None
        self._tokens = self._decoded(request, rows, stops)

    def send(self, value: None) -> np.ndarray:
        return self._tokens.send(value)

    def throw(self, *raised: Any) -> np.ndarray:
        return self._tokens.throw(*raised)

    def _decoded(
        self, request: Request, rows: list[list[int]], stops: Stops | None
    ) -> Generator[np.ndarray, None, None]:
        def states() -> Iterator[Decoding]:
            for decoding, cache in request.steps(*request.start(rows), 1, stops):
                self.acceptance = cache.acceptance if isinstance(cache, Speculation) else None
                yield decoding

        yield from _columns(states(), len(rows) * request.samples, stops)


def stream(
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
    prefix: Prefix | None = None,
    prefill_chunk: int = CHUNK,
    cache_dtype: CacheDType | None = None,
    speculate: Speculate | None = None,
) -> Stream:
    """Like [`mistral_eqx.generate`][], but yields each token as soon as it is decoded.

    It enters the same compiled loop once for each token. The first token comes before the loop is compiled. With
    `speculate`, the tokens of a pass come together, and the rows wait for the one that has fewest.

    **Arguments:** those of `generate`, except `logprobs`. A row ends with the token that completes a stop string;
    [`mistral_eqx.StopText`][] decodes the tokens and leaves the stop string out.

    **Returns:** an iterator over int32 arrays of shape `(batch * num_samples,)`: one token a row, -1 for a row that has
    ended. It stops when all rows have ended, or after `max_new_tokens`. With `speculate`, its `acceptance` counts
    proposed and accepted tokens, as in [`mistral_eqx.Acceptance`][].

    **Raises:** `ValueError` as `generate` does, at the call.
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
        prefix=prefix,
        prefill_chunk=prefill_chunk,
        cache_dtype=cache_dtype,
        speculate=speculate,
    )
    before = [row for row in rows for _ in range(num_samples)]
    return Stream(request, rows, stop_rows(stop, tokenizer, before))


def _columns(states: Iterable[Decoding], count: int, stops: Stops | None) -> Iterator[np.ndarray]:
    """The new tokens of the first `count` rows, one a row at a time, as soon as all that have not ended have one."""
    given = 0
    for decoding in states:
        tokens, lengths, ended = (
            gather_to_host(x)[:count] for x in (decoding.tokens, decoding.lengths, decoding.ended)
        )
        if stops is not None:
            lengths = np.where(stops.lengths < 0, lengths, stops.lengths)
        complete = int(np.min(lengths, where=~ended, initial=lengths.max()))
        for column in range(given, complete):
            yield np.where(lengths > column, tokens[:, column], -1)
        given = complete


class Conversation:
    """A sequence that grows turn by turn, with its KV cache.

    ```python
    chat = Conversation(model)
    for token in chat.reply(ids, max_new_tokens=200):
        ...
    ```

    **Arguments:**

    - `model`: the model.
    - `cache_dtype`, `speculate`: as in [`mistral_eqx.generate`][].
    """

    def __init__(self, model: Mistral, *, cache_dtype: CacheDType | None = None, speculate: Speculate | None = None):
        self._model = checked(model, Mistral, "model")
        self._cache_dtype = checked(cache_dtype, CacheDType | None, "cache_dtype")
        self._speculate = checked_speculate(speculate, model)
        self._ids: list[int] = []
        self._cache: Cached | None = None

    def reply(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        eos_id: int | Sequence[int] | None = None,
        key: Key[Array, ""] | None = None,
        stop: str | Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
    ) -> Iterator[int]:
        """Continues the whole sequence so far.

        **Arguments:**

        - `ids`: the whole sequence, from its first token on. The tokens that it shares with the sequence before are
            not prefilled again.
        - `max_new_tokens`, `sampler`, `eos_id`, `key`, `stop`, `tokenizer`: as in [`mistral_eqx.generate`][].

        **Returns:** an iterator over new tokens, an end token included, or the one that completes a stop string. It may
        be left early.

        **Raises:** `ValueError` as `generate` does, at the call.
        """
        (row,) = checked_prompts([ids], self._model.config.vocab)
        request = Request.init(
            self._model,
            [row],
            max_new_tokens,
            Sampler() if sampler is None else sampler,
            eos_id,
            key,
            cache_dtype=self._cache_dtype,
            speculate=self._speculate,
        )
        stops = stop_rows(stop, tokenizer, [row])

        def tokens() -> Iterator[int]:
            state = self._read(request, row)
            self._ids = list(row)

            def states() -> Iterator[Decoding]:
                for decoding, self._cache in request.steps(*state, 1, stops):
                    yield decoding

            for (token,) in _columns(states(), 1, stops):
                self._ids.append(int(token))
                yield int(token)

        return tokens()

    def _read(self, request: Request, row: list[int]) -> tuple[Decoding, Cached]:
        cached, self._cache = self._cache, None
        # An interrupted step leaves a cache that was donated and not replaced.
        if cached is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(cached)):
            return request.start([row], forgets=False)
        cache, draft = (cached.cache, cached.draft) if isinstance(cached, Speculation) else (cached, None)
        common = next((at for at, (old, new) in enumerate(zip(self._ids, row, strict=False)) if old != new), None)
        common = min(len(self._ids), len(row)) if common is None else common
        # At least one token is prefilled, for its logits.
        known = min(common, int(gather_to_host(cache.next_positions)[0]), len(row) - 1)
        ids, positions = pad_left([row[known:]], prompt_width(len(row) - known), starts=[known])
        new = first_room(request.max_new_tokens)
        room = capacity(int(cache.used) + ids.shape[1] + new)
        # Edits leave unused slots; if most of the cache is such slots, a new cache is better.
        if room > 2 * capacity(prompt_width(len(row)) + new):
            return request.start([row], forgets=False)
        room = max(slots(self._model, room), cache.kv_seq)
        decoding, cache = request.read(ids, positions, grow(self._model, cache, room).keep(known))
        if draft is not None:
            # The draft may have read less, if it was off.
            known = min(known, int(gather_to_host(draft.next_positions)[0]))
        return decoding, request.begin([row], decoding, cache, draft, known)
