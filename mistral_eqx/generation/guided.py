"""Tokens that the host allows from step to step, such as those that follow a grammar."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..documents import shown
from ..errors import InputError
from .processors import AbstractProcessor
from .sampler import Sampler


@runtime_checkable
class Guide(Protocol):
    """Allows only some tokens in one answer, such as those that follow a grammar."""

    def allowed(self) -> Bool[np.ndarray, " vocab"]:
        """Which tokens may come next, end tokens among them."""
        ...

    def push(self, id: int) -> None:
        """Adds the next token."""
        ...


@runtime_checkable
class Grammar(Protocol):
    """Makes a guide for each answer."""

    def guide(self) -> Guide:
        """A guide before the first token."""
        ...


class Allowed(eqx.Module):
    """Which tokens each row may have next."""

    allowed: Bool[Array, "batch vocab"]


class Guided(AbstractProcessor):
    """Allows only tokens that follow a grammar.

    ```python
    grammar = mx.Grammar.json_schema(tokenizer, {"type": "array", "items": {"type": "integer"}})
    sampler = mx.Sampler(processors=[mx.Guided(grammar)])
    ```

    The host computes the mask of each row after each token, so the compiled loop decodes one token at a time, as in
    [`mistral_eqx.stream`][]. Another grammar does not recompile it. A row that has ended repeats its end token.

    **Arguments:**

    - `grammar`: a [`mistral_eqx.Grammar`][]; or any object whose method `guide()` returns one with the methods
        `allowed()`, a boolean for each token of the vocabulary, and `push(id)`. Tokens past the end of that mask are
        forbidden.

    **Raises:** `ValueError` if it is no grammar.
    """

    grammar: Grammar | None

    def __init__(self, grammar: Grammar):
        if not isinstance(grammar, Grammar):
            raise InputError(f"{shown(grammar)} is no grammar; give one, such as mistral_eqx.Grammar.regex makes.")
        self.grammar = grammar

    def init_state(self, texts: Sequence[Sequence[int]], ends: Sequence[int], vocab: int) -> Allowed:
        first = np.ones(vocab, bool) if self.grammar is None else allowed(self.grammar.guide(), vocab)
        return Allowed(jnp.asarray(np.repeat(first[None], len(texts), 0)))

    def __call__(
        self, logits: Float[Array, "batch vocab"], state: Allowed, ids: Int[Array, " vocab"]
    ) -> Float[Array, "batch vocab"]:
        return jnp.where(state.allowed, logits, -jnp.inf)

    def next_state(self, state: Allowed, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> Allowed:
        return state


class Guides:
    """The guides of a batch: one for each row and each processor that has a grammar.

    **Arguments:**

    - `grammars`: those of the processors.
    - `rows`: the number of rows.
    """

    def __init__(self, grammars: Sequence[Grammar | None], rows: int):
        self._guides = [None if grammar is None else [grammar.guide() for _ in range(rows)] for grammar in grammars]

    def __bool__(self) -> bool:
        return any(guides is not None for guides in self._guides)

    def push(
        self, tokens: Int[np.ndarray, " rows"], ended: Bool[np.ndarray, " rows"], vocab: int
    ) -> list[Bool[np.ndarray, "rows vocab"] | None]:
        """Adds the last token of each row that has not ended.

        **Returns:** for each processor which tokens may come next, or `None` if it has no grammar.
        """
        masks: list[Bool[np.ndarray, "rows vocab"] | None] = []
        for guides in self._guides:
            mask = None if guides is None else np.ones((len(tokens), vocab), bool)
            for row, guide in enumerate(guides or ()):
                if mask is not None and not ended[row]:
                    guide.push(int(tokens[row]))
                    mask[row] = allowed(guide, vocab)
            masks.append(mask)
        return masks


def allowed(guide: Guide, vocab: int) -> Bool[np.ndarray, " vocab"]:
    """Which tokens of a model a guide allows. Those that its tokenizer lacks are padding of the embedding.

    **Raises:** `ValueError` if the guide has more tokens than the model.
    """
    mask = guide.allowed()
    if len(mask) > vocab:
        raise InputError(
            f"The grammar is for a vocabulary of {len(mask)} tokens, but the model has {vocab}; make the grammar with "
            "the model's own tokenizer."
        )
    return np.pad(mask, (0, vocab - len(mask)))


def grammars_of(sampler: Sampler) -> tuple[Grammar | None, ...]:
    """The grammar of each processor, `None` for one without."""
    return tuple(one.grammar if isinstance(one, Guided) else None for one in sampler.processors)


def without_grammars(sampler: Sampler) -> Sampler:
    """The sampler of a compiled loop, which would be compiled for each grammar if it had one."""

    def grammars(sampler: Sampler) -> list[Any]:
        return [one.grammar for one in sampler.processors if isinstance(one, Guided)]

    return eqx.tree_at(grammars, sampler, replace_fn=lambda _: None) if grammars(sampler) else sampler
