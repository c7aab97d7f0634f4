"""An adapter for EleutherAI's lm-evaluation-harness. It needs the extra `eval`, so no other file imports it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import jax
import jax.random as jr
import numpy as np


try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise ImportError(
        "The adapter needs EleutherAI's lm-evaluation-harness, which is not installed; run pip install "
        "'mistral-eqx[eval]'."
    ) from error

from ..checks import Count, Seed, checked
from ..errors import InputError
from ..generation import Sampler, generate
from ..generation.stops import Stops
from ..nn import Mistral
from .scoring import score


@runtime_checkable
class Tokenizer(Protocol):
    """The attributes and methods of a tokenizer that the adapter needs."""

    name: str
    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """The ids of a text."""
        ...

    def decode(self, ids: Any, *, skip_special: bool = True, after: Sequence[SupportsIndex] = ()) -> str:
        """The text of ids that continue the ids `after`."""
        ...

    def find_stops(self, stop: str | Sequence[str], after: Sequence[Sequence[SupportsIndex]]) -> Stops:
        """A search for stop strings in rows that continue the ids `after`."""
        ...


class Harness(TemplateLM):
    """A model for EleutherAI's [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness).

    ```python
    import lm_eval
    from mistral_eqx.evaluate.harness import Harness

    results = lm_eval.simple_evaluate(Harness(model, tokenizer), tasks=["hellaswag"])
    ```

    Requests are sorted by length and run in padded batches; each gives the same result as alone. The adapter encodes,
    cuts and continues texts as the harness does for models of transformers, so that the metrics can be compared.
    """

    def __init__(
        self,
        model: Mistral,
        tokenizer: Tokenizer,
        *,
        batch: int = 8,
        max_length: int | None = None,
        render_chat: Callable[..., str] | None = None,
        seed: int = 0,
    ):
        """**Arguments:**

        - `model`: a model on one device or on a mesh.
        - `tokenizer`: its tokenizer.
        - `batch`: the number of requests in a batch.
        - `max_length`: the most tokens of a request; the model's context unless given.
        - `render_chat`: `mistral_eqx.render_chat`, for tasks that use the model's chat template.
        - `seed`: the seed of tasks that sample.

        **Raises:** `ValueError` if `batch` is less than 1, `max_length` is more than the context, or the tokenizer
        has no end-of-sequence token.
        """
        super().__init__()
        context = model.config.max_positions
        batch = checked(batch, Count, "batch")
        seed = checked(seed, Seed, "seed")
        max_length = checked(max_length, int | None, "max_length")
        if not 1 <= (context if max_length is None else max_length) <= context:
            raise InputError(f"max_length is {max_length}; it must be from 1 to this model's context of {context}.")
        if not tokenizer.eos_ids:
            raise InputError(
                f"{tokenizer.name} has no end-of-sequence token, which the harness needs; use a tokenizer with one."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch = batch
        self.max_length = max_length or context
        self._render_chat = render_chat
        self._key = jr.key(seed)

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, control tokens included. A text that starts with the prefix token gets no second one."""
        name = self.tokenizer.decode([self.prefix_token_id], skip_special=False)
        if add_special_tokens is None and string.startswith(name):
            add_special_tokens = False
        add_bos = None if self.tokenizer.bos_id is None else add_special_tokens
        return self.tokenizer.encode(string, add_bos=add_bos, parse_special=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows = [[*before, *after][-self.max_length - 1 :] for _, before, after in requests]
        # The first scored token needs at least one token before it.
        counts = [min(len(after), len(row) - 1) for row, (_, _, after) in zip(rows, requests, strict=True)]
        for batch in self._batches(rows):
            scores = score(self.model, [rows[at] for at in batch], last=max(counts[at] for at in batch))
            log_probs, greedy = np.asarray(scores.log_probs, np.float64), np.asarray(scores.greedy)
            for row, at in enumerate(batch):
                scored = slice(len(rows[at]) - counts[at], len(rows[at]))
                found[at] = float(log_probs[row, scored].sum()), bool(greedy[row, scored].all())
                if requests[at][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[at][0], found[at])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows as long as `max_length` allows."""
        request_of: list[int] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        for at, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                request_of.append(at)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for at, (log_prob, _) in zip(request_of, self._loglikelihood_tokens(windows), strict=True):
            totals[at] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues texts until a stop string, the end of sequence, or `max_gen_toks` tokens.

        **Raises:** `ValueError` if a request has an unknown option, or `max_gen_toks` leaves no room for the context.
        """
        texts = [""] * len(requests)
        # The random numbers of a request depend on its index, not on its batch.
        keys = jax.vmap(jr.fold_in, in_axes=(None, 0))(self._key, np.arange(len(requests)))
        groups: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(at)
        for members in groups.values():
            options: dict[str, Any] = {**normalize_gen_kwargs(requests[members[0]].args[1])}
            new, stop = options.pop("max_gen_toks"), [one for one in options.pop("until") if one]
            sampler = _sampler(options)
            if new >= self.max_length:
                raise InputError(
                    f"max_gen_toks is {new}, and a text may have {self.max_length} tokens in all; make max_gen_toks "
                    "smaller."
                )
            contexts = [self.tok_encode(requests[at].args[0]) or [self.prefix_token_id] for at in members]
            contexts = [context[new - self.max_length :] for context in contexts]
            for batch in self._batches(contexts):
                numbers = [members[at] for at in batch]
                out = generate(
                    self.model,
                    [contexts[at] for at in batch],
                    max_new_tokens=new,
                    sampler=sampler,
                    eos_id=self.tokenizer.eos_ids,
                    key=keys[np.asarray(numbers)],
                    stop=stop,
                    tokenizer=self.tokenizer,
                )
                for number, row, length in zip(numbers, np.asarray(out.tokens), out.lengths.tolist(), strict=True):
                    # The harness decodes the new tokens of a transformers model alone, too.
                    text = postprocess_generated_text(self.tokenizer.decode(row[:length]), stop, None)
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, from the chat template.

        **Raises:** `ValueError` if `render_chat` was not given.
        """
        if self._render_chat is None:
            raise InputError("The task needs a chat template; give render_chat=mistral_eqx.render_chat.")
        return self._render_chat(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, for file names."""
        return self.tokenizer.name.replace("/", "__")

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Batches of row indices, longest rows first, so that rows of a batch have similar lengths."""
        order = sorted(range(len(rows)), key=lambda at: -len(rows[at]))
        for start in range(0, len(order), self.batch):
            yield order[start : start + self.batch]


def _sampler(options: dict[str, Any]) -> Sampler:
    """The sampler of a request's options; refuses unknown options."""
    do_sample = options.pop("do_sample")
    numbers = {name: options.pop(name, None) for name in ("temperature", "top_k", "top_p", "min_p", "typical_p")}
    if options:
        raise InputError(
            f"A task asks for {min(options)}={options[min(options)]!r} in its generation_kwargs, which the adapter "
            "does not support; leave it out of the task."
        )
    return Sampler(**numbers) if do_sample else Sampler()
