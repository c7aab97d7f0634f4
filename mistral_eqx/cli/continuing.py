"""Continues prompts in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .background import Background, interruptible
from .prompts import Prompt
from .wanted import Wanted


if TYPE_CHECKING:
    from ..generation import Beams, Generated
    from ..generation.proposals import Speculate
    from ..nn import Mistral
    from ..text import AbstractTokenizer, Grammar


@dataclasses.dataclass(frozen=True)
class Likely:
    """A token and its log-probability."""

    id: int
    token: str
    logprob: float


@dataclasses.dataclass(frozen=True)
class Chosen(Likely):
    """A new token, with the likeliest tokens at that step."""

    top: list[Likely]


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The continuation of a prompt.

    **Attributes:**

    - `text`: without the stop string that ended it.
    - `tokens`: the number of tokens, an end token included.
    - `finish`: `"stop"` if an end token or a stop string ended it, `"length"` if it has the most tokens allowed, and
        `None` if ctrl-C ended it.
    - `score`: its score in a beam search.
    - `logprobs`: those of its tokens, if requested.
    """

    text: str
    tokens: int
    finish: str | None
    score: float | None = None
    logprobs: list[Chosen] | None = None


def continue_batch(
    model: Mistral,
    tokenizer: AbstractTokenizer,
    prompts: Sequence[Prompt],
    wanted: Wanted,
    size: int = 0,
    grammar: Grammar | None = None,
    speculate: Speculate | None = None,
) -> tuple[list[list[Continuation]], bool]:
    """Continues each prompt.

    **Arguments:**

    - `size`: fewer prompts are filled up with copies of the first, because a batch of another size would be compiled
        anew.
    - `grammar`: what each text must be, from `wanted`.
    - `speculate`: what proposes tokens.

    **Returns:** for each prompt its texts, and whether ctrl-C came before they were complete. Then the texts have what
    was decoded so far; a beam search, and log-probabilities, then give no texts.
    """
    import mistral_eqx as mx

    filled = [*prompts, *[prompts[0]] * (size - len(prompts))]
    ids = [prompt.ids for prompt in filled]
    options = options_of(wanted, tokenizer, filled, grammar, speculate)
    texts = [_Text(tokenizer, wanted, prompt.ids) for prompt in prompts for _ in range(wanted.samples)]
    try:
        if wanted.num_beams is not None:
            best = interruptible(lambda: mx.beam_search(model, ids, **options))
            found = _best(best, texts, wanted)
        elif wanted.logprobs is not None:
            out = interruptible(lambda: mx.generate(model, ids, logprobs=wanted.logprobs, **options))
            found = _generated(out, texts, tokenizer)
        else:
            stream = Background(lambda: mx.stream(model, ids, **options))
            found, interrupted = _streamed(stream, texts)
            return _grouped(found, wanted.samples), interrupted
    except KeyboardInterrupt:
        return [], True
    return _grouped(found, wanted.samples), False


def options_of(
    wanted: Wanted,
    tokenizer: AbstractTokenizer,
    prompts: Sequence[Prompt],
    grammar: Grammar | None = None,
    speculate: Speculate | None = None,
) -> dict[str, Any]:
    """The arguments of `stream`, `generate` or `beam_search` besides the model and the prompts."""
    import jax
    import jax.numpy as jnp
    import jax.random as jr

    options: dict[str, Any] = {
        "max_new_tokens": wanted.max_new_tokens,
        "eos_id": () if wanted.ignore_eos else tokenizer.eos_ids,
        "cache_dtype": wanted.cache_dtype,
    }
    if wanted.num_beams is not None:
        options |= {"num_beams": wanted.num_beams, "num_return_sequences": wanted.samples}
        return options if wanted.length_penalty is None else options | {"length_penalty": wanted.length_penalty}
    numbers = jnp.asarray([prompt.number for prompt in prompts])
    options |= {
        "sampler": wanted.sampler(wanted.min_new_tokens or 0, grammar),
        "key": jax.vmap(jr.fold_in, in_axes=(None, 0))(jr.key(wanted.seed), numbers),
        "num_samples": wanted.samples,
    }
    if speculate is not None:
        options["speculate"] = speculate
    if wanted.stop:
        options |= {"stop": wanted.stop, "tokenizer": tokenizer}
    return options if wanted.prefill_chunk is None else options | {"prefill_chunk": wanted.prefill_chunk}


class _Text:
    """A text that grows token by token.

    **Arguments:**

    - `after`: the prompt that it continues.
    """

    def __init__(self, tokenizer: AbstractTokenizer, wanted: Wanted, after: list[int]):
        from ..text import StopText

        self._text = StopText(tokenizer, wanted.stop or (), after=after)
        self._ends = () if wanted.ignore_eos else tokenizer.eos_ids
        self._most = wanted.max_new_tokens
        self._parts: list[str] = []
        self._tokens = 0
        self._ended = False

    def push(self, tokens: Iterable[int]) -> _Text:
        for token in tokens:
            self._parts.append(self._text.push(token))
            self._tokens += 1
            self._ended = token in self._ends or self._text.stopped is not None
        return self

    def end(self, score: float | None = None, logprobs: list[Chosen] | None = None) -> Continuation:
        text = "".join([*self._parts, self._text.flush()])
        finish = "stop" if self._ended else "length" if self._tokens == self._most else None
        return Continuation(text, self._tokens, finish, score, logprobs)


def _streamed(stream: Iterable[Any], texts: Sequence[_Text]) -> tuple[list[Continuation], bool]:
    interrupted = False
    try:
        for tokens in stream:
            for text, token in zip(texts, tokens.tolist(), strict=False):
                if token >= 0:
                    text.push([token])
    except KeyboardInterrupt:
        interrupted = True
    return [text.end() for text in texts], interrupted


def _best(best: Beams, texts: Sequence[_Text], wanted: Wanted) -> list[Continuation]:
    import numpy as np

    tokens, lengths = np.asarray(best.tokens).reshape(-1, wanted.max_new_tokens), np.asarray(best.lengths).reshape(-1)
    scores = np.asarray(best.scores).reshape(-1)
    return [
        text.push(tokens[row, : lengths[row]].tolist()).end(score=_shortest(scores[row]))
        for row, text in enumerate(texts)
    ]


def _generated(out: Generated, texts: Sequence[_Text], tokenizer: AbstractTokenizer) -> list[Continuation]:
    import numpy as np

    tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
    chosen, top_tokens, top = (np.asarray(x) for x in (out.log_probs, out.top_tokens, out.top_log_probs))

    def likely(row: int, at: int) -> Chosen:
        id, others = int(tokens[row, at]), zip(top_tokens[row, at].tolist(), top[row, at], strict=True)
        alternatives = [Likely(other, tokenizer.token_name(other), _shortest(log)) for other, log in others]
        return Chosen(id, tokenizer.token_name(id), _shortest(chosen[row, at]), alternatives)

    return [
        text.push(tokens[row, : lengths[row]].tolist()).end(logprobs=[likely(row, at) for at in range(lengths[row])])
        for row, text in enumerate(texts)
    ]


def _shortest(x: Any) -> float:
    """A float32 as the float64 with the fewest digits."""
    return float(str(x))


def _grouped(texts: list[Continuation], size: int) -> list[list[Continuation]]:
    return [texts[at : at + size] for at in range(0, len(texts), size)]
