"""Changes of the logits before a token is chosen."""

import abc
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..checks import CountOrZero, Positive, checked
from ..documents import shown
from ..errors import InputError
from ..parallel import AbstractNamed


class AbstractProcessor(eqx.Module):
    """A step between the model's logits and the sampler.

    To write your own, define the three methods. The state of a processor is what it remembers of each sequence: a
    module whose array fields are annotated with jaxtyping, such as `Int[Array, "batch vocab"]`, or `None`. The compiled
    loop carries it from token to token. With `speculate`, rows get tokens at different times: a field that changes must
    have the dimension `batch`. Store a processor's own values as arrays, so that other values do not recompile the
    loop.
    """

    @abc.abstractmethod
    def init_state(self, texts: Sequence[Sequence[int]], ends: Sequence[int], vocab: int) -> PyTree:
        """The state before the first new token; nothing is compiled here.

        **Arguments:**

        - `texts`: the prompts' token ids, one list a row.
        - `ends`: the tokens that end a row.
        - `vocab`: the number of token ids.

        **Raises:** `ValueError` if the processor does not fit the vocabulary.
        """

    @abc.abstractmethod
    def __call__(
        self, logits: Float[Array, "batch vocab"], state: PyTree, ids: Int[Array, " vocab"]
    ) -> Float[Array, "batch vocab"]:
        """Returns new logits; minus infinity forbids a token.

        **Arguments:**

        - `logits`: shape `(batch, vocab)`. Where a strategy splits the vocabulary, a device has a shard of them.
        - `state`: what `init_state` or `next_state` returned.
        - `ids`: the token ids of the columns of `logits`, consecutive. Only where nothing splits the vocabulary do they
            begin with 0.
        """

    @abc.abstractmethod
    def next_state(self, state: PyTree, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> PyTree:
        """The state after one more token a row; `ids` as above."""


class Seen(eqx.Module):
    """Which tokens a row has."""

    seen: Bool[Array, "batch vocab"]

    def add(self, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> "Seen":
        """The same with one more token a row."""
        rows = jnp.arange(tokens.shape[0])
        return Seen(self.seen.at[rows, columns(tokens, ids)].set(True, mode="drop"))


class Counts(eqx.Module):
    """How often a row has each token."""

    counts: Int[Array, "batch vocab"]

    def add(self, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> "Counts":
        """The same with one more token a row."""
        rows = jnp.arange(tokens.shape[0])
        return Counts(self.counts.at[rows, columns(tokens, ids)].add(1, mode="drop"))


class RepetitionPenalty(AbstractProcessor):
    """Makes tokens of the sequence less likely, those of the prompt too: a positive logit is divided by the penalty, a
    negative one multiplied ([CTRL](https://arxiv.org/abs/1909.05858)).

    **Arguments:**

    - `penalty`: above 0; 1 changes nothing, less than 1 rewards.

    **Raises:** `ValueError` if it is outside its range.
    """

    penalty: np.ndarray | Float[Array, ""]

    def __init__(self, penalty: float):
        penalty = checked(penalty, Positive, "The repetition penalty", key="penalty")
        # Beyond these bounds a float32 would become 0 or infinity.
        self.penalty = np.asarray(np.clip(penalty, 1e-30, 1e30), np.float32)

    def init_state(self, texts: Sequence[Sequence[int]], ends: Sequence[int], vocab: int) -> Seen:
        seen = np.zeros((len(texts), vocab), bool)
        for row, text in enumerate(texts):
            seen[row, list(text)] = True
        return Seen(jnp.asarray(seen))

    def __call__(
        self, logits: Float[Array, "batch vocab"], state: Seen, ids: Int[Array, " vocab"]
    ) -> Float[Array, "batch vocab"]:
        penalty = self.penalty.astype(logits.dtype)
        return jnp.where(state.seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def next_state(self, state: Seen, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> Seen:
        return state.add(tokens, ids)


class PresencePenalty(AbstractProcessor):
    """Takes `penalty` off the logit of each token that was generated before; the prompt does not count.

    With [`mistral_eqx.FrequencyPenalty`][] it is the formula of [OpenAI](https://platform.openai.com/docs/advanced-usage),
    `logit - count * frequency - (count > 0) * presence`, which vLLM has too.

    **Arguments:**

    - `penalty`: from -2 to 2.

    **Raises:** `ValueError` if it is outside its range.
    """

    penalty: np.ndarray | Float[Array, ""]

    def __init__(self, penalty: float):
        self.penalty = _additive("presence", penalty)

    def init_state(self, texts: Sequence[Sequence[int]], ends: Sequence[int], vocab: int) -> Seen:
        return Seen(jnp.asarray(np.zeros((len(texts), vocab), bool)))

    def __call__(
        self, logits: Float[Array, "batch vocab"], state: Seen, ids: Int[Array, " vocab"]
    ) -> Float[Array, "batch vocab"]:
        return logits - self.penalty.astype(logits.dtype) * state.seen.astype(logits.dtype)

    def next_state(self, state: Seen, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> Seen:
        return state.add(tokens, ids)


class FrequencyPenalty(AbstractProcessor):
    """Takes `penalty` off the logit of a token for each time that it was generated before; the prompt does not count.

    See [`mistral_eqx.PresencePenalty`][] for the formula.

    **Arguments:**

    - `penalty`: from -2 to 2.

    **Raises:** `ValueError` if it is outside its range.
    """

    penalty: np.ndarray | Float[Array, ""]

    def __init__(self, penalty: float):
        self.penalty = _additive("frequency", penalty)

    def init_state(self, texts: Sequence[Sequence[int]], ends: Sequence[int], vocab: int) -> Counts:
        return Counts(jnp.asarray(np.zeros((len(texts), vocab), np.int32)))

    def __call__(
        self, logits: Float[Array, "batch vocab"], state: Counts, ids: Int[Array, " vocab"]
    ) -> Float[Array, "batch vocab"]:
        return logits - self.penalty.astype(logits.dtype) * state.counts.astype(logits.dtype)

    def next_state(self, state: Counts, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> Counts:
        return state.add(tokens, ids)


class LogitBias(AbstractProcessor):
    """Adds a number to the logits of some tokens.

    **Arguments:**

    - `biases`: token id to number; minus infinity forbids the token.

    **Raises:** `ValueError` if a value is not a number, or is plus infinity.
    """

    ids: np.ndarray | Int[Array, " ids"]
    biases: np.ndarray | Float[Array, " ids"]

    def __init__(self, biases: Mapping[int, float]):
        if not isinstance(biases, Mapping):
            raise InputError(f"biases is {shown(biases)}; give a dict of token ids and numbers, such as {{11: 1.5}}.")
        self.ids = np.asarray(_ids("A biased token", biases), np.int32)
        self.biases = np.asarray([_bias(id, bias) for id, bias in biases.items()], np.float32)

    def init_state(self, texts: Sequence[Sequence[int]], ends: Sequence[int], vocab: int) -> None:
        ids = _checked("biased", self.ids, vocab)
        _check_choice({id for id, bias in zip(ids, np.asarray(self.biases), strict=True) if np.isneginf(bias)}, vocab)

    def __call__(
        self, logits: Float[Array, "batch vocab"], state: None, ids: Int[Array, " vocab"]
    ) -> Float[Array, "batch vocab"]:
        biases = jnp.zeros(ids.shape, logits.dtype)
        return logits + biases.at[columns(self.ids, ids)].add(self.biases.astype(logits.dtype), mode="drop")[None]

    def next_state(self, state: None, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> None:
        return None


class BannedTokens(AbstractProcessor):
    """Forbids some tokens.

    **Arguments:**

    - `ids`: their ids.
    """

    ids: np.ndarray | Int[Array, " ids"]

    def __init__(self, ids: Iterable[SupportsIndex]):
        self.ids = np.asarray(sorted(set(_ids("A banned token", ids))), np.int32)

    def init_state(self, texts: Sequence[Sequence[int]], ends: Sequence[int], vocab: int) -> None:
        _check_choice(_checked("banned", self.ids, vocab), vocab)

    def __call__(
        self, logits: Float[Array, "batch vocab"], state: None, ids: Int[Array, " vocab"]
    ) -> Float[Array, "batch vocab"]:
        return jnp.where(_among(self.ids, ids)[None], -jnp.inf, logits)

    def next_state(self, state: None, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> None:
        return None


class Countdown(eqx.Module):
    """How many tokens must come in each row before one of `ends` is allowed."""

    left: Int[Array, " batch"]
    ends: Int[Array, " ends"]


class MinNewTokens(AbstractProcessor):
    """Forbids the end tokens until there are `count` new tokens. Stop strings are not held back.

    **Arguments:**

    - `count`: at least 0.

    **Raises:** `ValueError` if it is outside its range.
    """

    count: np.ndarray | Int[Array, ""]

    def __init__(self, count: int):
        self.count = np.asarray(checked(count, CountOrZero, "The least number of new tokens", key="count"), np.int32)

    def init_state(self, texts: Sequence[Sequence[int]], ends: Sequence[int], vocab: int) -> Countdown:
        if self.count > 0:
            _check_choice(set(ends), vocab)
        left = np.full(len(texts), self.count, np.int32)
        return Countdown(jnp.asarray(left), jnp.asarray(np.asarray(ends, np.int32)))

    def __call__(
        self, logits: Float[Array, "batch vocab"], state: Countdown, ids: Int[Array, " vocab"]
    ) -> Float[Array, "batch vocab"]:
        forbidden = _among(state.ends, ids)[None] & (state.left > 0)[:, None]
        return jnp.where(forbidden, -jnp.inf, logits)

    def next_state(self, state: Countdown, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> Countdown:
        return Countdown(jnp.maximum(state.left - 1, 0), state.ends)


class Rows(AbstractNamed):
    """Any arrays with one entry a row."""

    value: PyTree

    def array_dims(self) -> dict[str, str]:
        return dict.fromkeys(_paths(self), "batch")


class Constraint(AbstractProcessor, AbstractNamed):
    """Allows only tokens that follow a grammar, a pattern or any other automaton.

    Both functions are for one row. They are compiled into the decoding loop, so they must use JAX operations. Usually
    they are methods of an `equinox.Module` that holds a table; another table of the same shape does not recompile.
    `examples/constraint.py` makes one from a regular expression.

    A row that has ended repeats its end token, whatever is allowed. If a row that has not ended has no allowed token,
    generation stops with a `ValueError`.

    **Arguments:**

    - `allowed`: from a state to a mask over the vocabulary: which tokens may come next, the end token among them.
    - `advance`: from a state and a token to the next state, of the same shapes and types.
    - `state`: the state before the first new token: an array or several, the same for each row.
    """

    allowed: Callable[[Any], Bool[Array, " vocab"]]
    advance: Callable[[Any, Int[Array, ""]], Any]
    state: PyTree

    def __init__(
        self,
        allowed: Callable[[Any], Bool[Array, " vocab"]],
        advance: Callable[[Any, Int[Array, ""]], Any],
        state: PyTree,
    ):
        for name, function in (("allowed", allowed), ("advance", advance)):
            if not callable(function):
                raise InputError(f"A constraint's `{name}` is {shown(function)}; give a function of a row's state.")
        # Put on the device now; otherwise each call of the loop would send the table again.
        self.allowed, self.advance = jax.tree.map(
            lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, (allowed, advance)
        )
        self.state = jax.tree.map(jnp.asarray, state)

    def array_dims(self) -> dict[str, str]:
        return dict.fromkeys(_paths(self), "")

    def init_state(self, texts: Sequence[Sequence[int]], ends: Sequence[int], vocab: int) -> Rows:
        mask = eqx.filter_eval_shape(self.allowed, self.state)
        if not isinstance(mask, jax.ShapeDtypeStruct) or (mask.shape, mask.dtype) != ((vocab,), np.bool_):
            raise InputError(
                f"A constraint's `allowed` must return one boolean for each of the {vocab} tokens of the vocabulary, "
                f"but it returned {_described(mask)}."
            )
        state = jax.eval_shape(lambda: self.state)
        after = eqx.filter_eval_shape(self.advance, self.state, jax.ShapeDtypeStruct((), np.int32))
        if _described(after) != _described(state):
            raise InputError(
                f"A constraint's `advance` must return a state like the one that it is given, {_described(state)}, "
                f"but it returned {_described(after)}."
            )
        return Rows(jax.tree.map(lambda x: jnp.asarray(np.repeat(np.asarray(x)[None], len(texts), 0)), self.state))

    def __call__(
        self, logits: Float[Array, "batch vocab"], state: Rows, ids: Int[Array, " vocab"]
    ) -> Float[Array, "batch vocab"]:
        allowed = jax.vmap(self.allowed)(state.value)
        own = lax.dynamic_slice_in_dim(allowed, ids[0], len(ids), axis=1)
        return jnp.where(own, logits, -jnp.inf)

    def next_state(self, state: Rows, tokens: Int[Array, " batch"], ids: Int[Array, " vocab"]) -> Rows:
        return Rows(jax.vmap(self.advance)(state.value, tokens))


def _additive(name: str, penalty: float) -> np.ndarray:
    kind = Annotated[float, Ge(-2), Le(2)]
    return np.asarray(checked(penalty, kind, f"The {name} penalty", key="penalty"), np.float32)


def _bias(id: int, bias: float) -> float:
    if isinstance(bias, float | np.floating) and np.isneginf(bias):
        return float(bias)
    limit = float(np.finfo(np.float32).max)
    remedy = "minus infinity forbids a token"
    return checked(bias, Annotated[float, Ge(-limit), Le(limit)], f"The bias of the token {id}", remedy=remedy)


def _ids(name: str, ids: Any) -> list[int]:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise InputError(f"{shown(ids)} are no token ids; give a list of whole numbers.", key="ids")
    # Whether the vocabulary has them is seen once there is one.
    kind = Annotated[int, Ge(-(2**31)), Le(2**31 - 1)]
    return [checked(id, kind, name, key="ids") for id in ids]


def _checked(kind: str, ids: np.ndarray | Array, vocab: int) -> list[int]:
    ids = np.asarray(ids)
    if wrong := ids[(ids < 0) | (ids >= vocab)].tolist():
        raise InputError(f"The {kind} token {wrong[0]} is outside the vocabulary of {vocab}; leave it out.")
    return ids.tolist()


def _check_choice(forbidden: Collection[int], vocab: int):
    if len(forbidden) == vocab:
        raise InputError(f"All {vocab} tokens of the vocabulary are forbidden; leave at least one to choose.")


def columns(tokens: np.ndarray | Int[Array, " *tokens"], ids: Int[Array, " vocab"]) -> Int[Array, " *tokens"]:
    """Which columns have these tokens, if `ids` are the columns' ids; past the end, to be dropped, for other tokens."""
    columns = jnp.asarray(tokens) - ids[0]
    return jnp.where((columns >= 0) & (columns < len(ids)), columns, len(ids))


def _among(tokens: np.ndarray | Int[Array, " tokens"], ids: Int[Array, " vocab"]) -> Bool[Array, " vocab"]:
    return jnp.zeros(ids.shape, bool).at[columns(tokens, ids)].set(True, mode="drop")


def _paths(tree: PyTree) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def _described(tree: PyTree) -> str:
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x), tree))
