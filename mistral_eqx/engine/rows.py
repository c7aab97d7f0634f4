"""The state of all rows, and the one compiled program that decodes them."""

import dataclasses
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from ..generation.finite import lost, marked
from ..generation.flat import Flat
from ..generation.log_probs import LogProbs
from ..generation.processors import columns
from ..generation.sampler import column_ids
from ..lora import for_rows
from ..nn import Cache, Mistral
from ..parallel import Strategy, shard_index, specs, spmd
from .choice import Numbers, any_row, where_any
from .request import MOST_ENDS, MOST_LOGPROBS
from .ring import entered_cache, joined, parted, resized_cache, turned


# How many tokens of a row one call can decode without proposals.
MOST_STEPS = 8


class Rows(eqx.Module):
    """The state of the rows of an engine, besides the cache.

    **Attributes:**

    - `token`: the last token of each row, which is not in the cache yet.
    - `position`: that token's position in its row.
    - `step`: the number of new tokens.
    - `limit`: the most new tokens.
    - `active`: which rows decode.
    - `lost`: as in `generation.loop.Decoding`.
    - `ends`: end tokens, -1 for none.
    - `keys`: the numbers of a key for each row; the draw of a step uses the row's key and the step.
    - `numbers`: those of samplers and processors.
    - `prompt`: which tokens are in the prompt.
    - `counts`: how often each token was generated.
    - `biases`: added to the logits.
    - `reports`: which rows ask for log-probabilities.
    - `adapter`: the number of each row's LoRA adapter, -1 for none.
    """

    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    step: Int[Array, " batch"]
    limit: Int[Array, " batch"]
    active: Bool[Array, " batch"]
    lost: Int[Array, " batch"]
    ends: Int[Array, "batch _"]
    keys: UInt32[Array, "batch _"]
    numbers: Numbers
    prompt: Bool[Array, "batch vocab"]
    counts: Int[Array, "batch vocab"]
    biases: Float[Array, "batch vocab"]
    reports: Bool[Array, " batch"]
    adapter: Int[Array, " batch"]

    @classmethod
    def init(
        cls,
        batch: int,
        vocab: int,
        numbers: Numbers,
        *,
        text: tuple[int, ...] = (0,),
        limit: int = 0,
        ends: tuple[int, ...] = (),
        key: Key[Array, ""] | None = None,
        biases: Mapping[int, float] | None = None,
        reports: bool = False,
        adapter: int = -1,
    ) -> "Rows":
        """Rows with the same prompt; without `limit` they do not decode."""
        by_row = jnp.zeros(batch, jnp.int32)
        row_ends = np.full((batch, MOST_ENDS), -1, np.int32)
        row_ends[:, : len(ends)] = ends
        prompt, bias = np.zeros((batch, vocab), bool), np.zeros((batch, vocab), np.float32)
        prompt[:, list(text)] = True
        for id, value in (biases or {}).items():
            bias[:, id] = value
        return cls(
            token=by_row + text[-1],
            position=by_row + len(text) - 1,
            step=by_row,
            limit=by_row + limit,
            active=by_row < limit,
            lost=by_row,
            ends=jnp.asarray(row_ends),
            keys=jnp.tile(jr.key_data(jr.key(0) if key is None else key)[None], (batch, 1)),
            numbers=numbers,
            prompt=jnp.asarray(prompt),
            counts=jnp.zeros((batch, vocab), jnp.int32),
            biases=jnp.asarray(bias),
            reports=jnp.full(batch, reports),
            adapter=by_row + adapter,
        )

    def next(
        self,
        logits: Float[Array, "batch vocab"],
        words: UInt32[Array, "batch words"],
        guided: Bool[Array, " batch"],
        strategy: Strategy,
    ) -> "Rows":
        """The rows after one more token each, chosen by its logits.

        **Arguments:**

        - `words`: which tokens the guides allow, one bit each.
        - `guided`: which rows have a guide.
        """
        ids = column_ids(logits, strategy)
        processed = self.numbers.process(logits, self.prompt, self.counts, self.biases, self.ends, self.step, strategy)

        def allowed_only(logits: Array) -> Array:
            allowed = (words[:, ids // 32] >> (ids % 32).astype(jnp.uint32)[None]) & 1
            return jnp.where(guided[:, None] & (allowed == 0), -jnp.inf, logits)

        processed = where_any(guided, allowed_only, processed, strategy)
        keys = jax.vmap(jr.fold_in)(jr.wrap_key_data(self.keys), self.step)
        token, largest = self.numbers.choose(marked(logits, processed), keys, strategy)
        token, ended = jnp.where(self.active, token, self.token), jnp.any(token[:, None] == self.ends, axis=1)
        now_lost, one = jnp.where(self.active, lost(largest), self.lost), self.active.astype(jnp.int32)
        step, at = self.step + one, columns(token, ids)
        return dataclasses.replace(
            self,
            token=token,
            position=self.position + one,
            step=step,
            active=self.active & ~ended & (now_lost == 0) & (step < self.limit),
            lost=now_lost,
            counts=self.counts.at[jnp.arange(len(token)), at].add(one, mode="drop"),
        )


class Decoded(eqx.Module):
    """The tokens of one call.

    **Attributes:**

    - `tokens`: -1 where a row has none. Each pass has as many columns as it checks tokens of a row, and each row's
        new tokens are in the first of them.
    - `lost`: as in `generation.loop.Decoding`; the last token of such a row is none.
    - `log_probs`: of rows that ask for them.
    - `slots`: how many slots the pointer went on.
    - `proposals`: the proposed tokens, -1 for none.
    """

    tokens: Int[Array, "batch _"]
    lost: Int[Array, " batch"]
    log_probs: LogProbs
    slots: Int[Array, ""]
    proposals: Int[Array, "batch _"]

    @classmethod
    def init(cls, vocab: int, columns: int, proposals: Int[Array, "batch _"]) -> "Decoded":
        """Without a token."""
        batch = len(proposals)
        log_probs = LogProbs.init(batch, columns, min(MOST_LOGPROBS, vocab))
        none = jnp.zeros(batch, jnp.int32)
        return cls(jnp.full((batch, columns), -1, jnp.int32), none, log_probs, jnp.zeros((), jnp.int32), proposals)


def draft_tokens(
    draft: Mistral, rows: Rows, cache: Cache, given: Int[Array, "batch proposed"]
) -> tuple[Int[Array, "batch proposed"], Cache]:
    """What a draft chooses, with the random numbers with which the model will choose.

    **Arguments:**

    - `rows`: the processors are left out, since their states belong to the model.
    - `cache`: the draft's, in which each row's last token is missing.
    - `given`: -1 in a row without proposals.

    **Returns:** the tokens, -1 in such a row, and the cache with all of them, since the model may accept all.
    """

    def read(token: Array, number: Array | int, cache: Cache) -> tuple[Array, Cache]:
        at = jnp.where(rows.active, rows.position + number, -1)
        return draft.hidden(token[:, None], at[:, None], cache)

    def next_token(carry: tuple[Array, Cache], number: Array) -> tuple[tuple[Array, Cache], Array]:
        hidden, cache = read(carry[0], number, carry[1])
        keys = jax.vmap(jr.fold_in)(jr.wrap_key_data(rows.keys), rows.step + number)
        token, _ = rows.numbers.choose(draft.logits(hidden)[:, 0], keys, draft.strategy)
        return (token, cache), token

    count = given.shape[1]
    (token, cache), tokens = lax.scan(next_token, (rows.token, cache), jnp.arange(count, dtype=jnp.int32))
    _, cache = read(token, count, cache)
    return jnp.where(given < 0, -1, tokens.T), cache


@eqx.filter_jit(donate="all-except-first")
def decode_rows(
    kept: tuple[Flat, Flat | None, tuple[Array, ...], Int[Array | np.ndarray, ""]], carried: Flat
) -> tuple[Flat, Decoded]:
    """Decodes some tokens of each row in one loop; it ends when no row decodes.

    **Arguments:**

    - `kept`: the model, and a draft that is to propose tokens; by row, whether it is still wanted, `words` and `guided`
        as for `Rows.next`, and proposed tokens, -1 for none, which a draft replaces; the number of passes, which is 1
        if there are proposals, else at most `MOST_STEPS`.
    - `carried`: the rows and the cache, donated and updated in place.
    """
    flat, drafter, given, passes = kept
    model: Mistral = flat.tree
    draft: Mistral | None = None if drafter is None else drafter.tree
    strategy = model.strategy

    def loop(
        model: Mistral,
        draft: Mistral | None,
        wanted: Array,
        words: Array,
        guided: Array,
        proposals: Array,
        passes: Array,
        rows: Rows,
        cache: Cache,
        out: Decoded,
    ) -> tuple[Rows, Cache, Decoded]:
        width = 1 + proposals.shape[1]
        rows = dataclasses.replace(rows, active=rows.active & wanted)
        cache, drafted = parted(cache, model.config.layers)
        if draft is not None:
            proposals, drafted = draft_tokens(draft, rows, turned(drafted, width, strategy)[0], proposals)
            out = dataclasses.replace(out, proposals=proposals)
        # No token follows the last proposal.
        following = jnp.pad(proposals, ((0, 0), (0, 1)), constant_values=-1)

        def unfinished(carry):
            number, goes_on, *_ = carry
            return (number < passes) & goes_on

        def next_pass(carry):
            number, _, rows, cache, out = carry
            checked = jnp.concatenate([rows.token[:, None], proposals], axis=1)
            at = rows.position[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
            positions = jnp.where(rows.active[:, None] & (checked >= 0), at, -1)
            cache, skipped = turned(cache, width, strategy)
            hidden, written = model.hidden(jnp.maximum(checked, 0), positions, cache)
            logits = model.logits(hidden)

            def next_token(carry):
                column, _, going, rows, out = carry
                one = lax.dynamic_index_in_dim(logits, column, 1, keepdims=False)
                after = dataclasses.replace(rows, active=going).next(one, words, guided, strategy)
                token = jnp.where(going, after.token, -1)
                number_of = number * width + column
                tokens = lax.dynamic_update_slice_in_dim(out.tokens, token[:, None], number_of, axis=1)

                def record(log_probs: LogProbs) -> LogProbs:
                    return log_probs.record(one, after.token, number_of, strategy)

                reports = any_row(going & rows.reports, strategy)
                log_probs = lax.cond(reports, record, lambda log_probs: log_probs, out.log_probs)
                # A row goes on if the next logits are those after the token that it has now.
                proposed = lax.dynamic_index_in_dim(following, column, 1, keepdims=False)
                goes_on = after.active & (token == proposed)
                rows = dataclasses.replace(after, active=jnp.where(going, after.active, rows.active))
                out = Decoded(tokens, after.lost, log_probs, out.slots, out.proposals)
                # All devices leave the loop together, even those whose own rows have ended.
                return column + 1, any_row(goes_on, strategy), goes_on, rows, out

            column, _, _, rows, out = lax.while_loop(
                lambda carry: carry[1],
                next_token,
                (jnp.zeros_like(number), any_row(rows.active, strategy), rows.active, rows, out),
            )
            # The slots of rejected tokens are empty. The next pass overwrites those that no row has used.
            cache = Cache(written.layers, written.keep(rows.position).positions, cache.used + column)
            out = dataclasses.replace(out, slots=out.slots + skipped + column)
            return number + 1, any_row(rows.active, strategy), rows, cache, out

        model = for_rows(model, rows.adapter)
        _, _, rows, cache, out = lax.while_loop(
            unfinished, next_pass, (jnp.zeros_like(passes), any_row(rows.active, strategy), rows, cache, out)
        )
        return rows, joined(cache, drafted), out

    rows, cache = carried.tree
    columns = max(MOST_STEPS, 1 + given[-1].shape[1])
    out = Decoded.init(rows.prompt.shape[1], columns, given[-1])
    by_row, whole = strategy.spec("batch"), strategy.spec("")
    state, layers, decoded = specs(rows, strategy), specs(cache, strategy), specs(out, strategy)
    drafts = None if draft is None else specs(draft, strategy)
    in_specs = specs(model, strategy), drafts, *(by_row for _ in given), whole, state, layers, decoded
    rows, cache, out = spmd(loop, model.mesh, in_specs, (state, layers, decoded))(
        model, draft, *given, passes, rows, cache, out
    )
    return Flat((rows, cache)), out


@eqx.filter_jit(donate="all-except-first")
def enter(
    kept: tuple[Mesh | None, Strategy, Rows, Cache, Int[Array | np.ndarray, ""], Int[Array | np.ndarray, ""]],
    carried: Flat,
) -> Flat:
    """Puts a prompt into one row.

    **Arguments:**

    - `kept`: the model's mesh and strategy; the state of the row, and the cache of its prompt without the last token,
        once for each part of `batch`; the number of tokens in that cache; the row.
    - `carried`: the rows and the cache, donated and updated in place.
    """
    mesh, strategy, new, prompt, length, row = kept

    def replace(new: Rows, prompt: Cache, length: Array, row: Array, rows: Rows, cache: Cache) -> tuple[Rows, Cache]:
        shard, _ = shard_index("batch", strategy)
        count = len(rows.token)
        own = row - shard * count
        at = jnp.clip(own, 0, count - 1)

        def put(x: Array, value: Array) -> Array:
            old = lax.dynamic_slice_in_dim(x, at, 1)
            return lax.dynamic_update_slice_in_dim(x, jnp.where(at == own, value, old), at, 0)

        return jax.tree.map(put, rows, new), entered_cache(cache, prompt, length, put, strategy)

    rows, cache = carried.tree
    whole, state, layers = strategy.spec(""), specs(rows, strategy), specs(cache, strategy)
    in_specs = specs(new, strategy), specs(prompt, strategy), whole, whole, state, layers
    result = spmd(replace, mesh, in_specs, (state, layers))(new, prompt, length, row, rows, cache)
    return Flat(result)


@eqx.filter_jit
def resized(mesh: Mesh | None, strategy: Strategy, order: Int[Array, " batch"], carried: Flat, kv_seq: int) -> Flat:
    """Copies of the rows and of the cache, of other sizes.

    **Arguments:**

    - `mesh`, `strategy`: those of the model.
    - `order`: for each new row the old one of the same device that it continues, -1 for an empty row.
    - `carried`: the rows and the cache.
    - `kv_seq`: the new number of slots.
    """
    share = kv_seq // strategy.parts("kv_seq", mesh)

    def copy(order: Array, rows: Rows, cache: Cache) -> tuple[Rows, Cache]:
        rows = jax.tree.map(lambda x: jnp.take(x, order, axis=0, mode="clip"), rows)
        rows = dataclasses.replace(rows, active=rows.active & (order >= 0))
        return rows, resized_cache(cache, order, share, strategy)

    rows, cache = carried.tree
    split = specs(rows, strategy), specs(cache, strategy)
    return Flat(spmd(copy, mesh, (strategy.spec("batch"), *split), split)(order, rows, cache))
