import dataclasses
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import SMALL, empty_cache, relative_error, run, run_in_pieces, small_model
from fixtures.sharding import written

from mistral_eqx.config import Routing
from mistral_eqx.nn import Context
from mistral_eqx.nn.kernels import contract_grouped, native
from mistral_eqx.planning.hlo import kernel_flops


ROUTED = dataclasses.replace(SMALL, routing=Routing(experts=5, per_token=2))


def layer(*, experts=5, per_token=2, dtype="float32", seed=0):
    config = dataclasses.replace(SMALL, layers=1, windows=(None,), routing=Routing(experts, per_token))
    return small_model(seed, config=config, dtype=dtype).blocks[0].feed_forward


def activations(*shape, seed=1, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*shape, SMALL.embed)), dtype)


@eqx.filter_jit
def applied(module, x):
    return module(x)


def by_numpy(module, x, kept=True):
    """Each expert computes every token; the shares of those not chosen, and of choices that are not kept, are zero."""
    x = np.asarray(x, np.float64)
    router, gate, up, down = (
        np.asarray(one.weight.value, np.float64)
        for one in (module.router, module.gate_proj, module.up_proj, module.down_proj)
    )
    scores = np.exp(x @ router.T)
    chosen = np.argsort(-scores, axis=-1)[..., : module.router.per_token]
    shares = np.zeros_like(scores)
    np.put_along_axis(shares, chosen, np.take_along_axis(scores, chosen, -1), -1)
    shares /= shares.sum(-1, keepdims=True)
    np.put_along_axis(shares, chosen, np.take_along_axis(shares, chosen, -1) * kept, -1)
    gated = np.einsum("ehd,bsd->bseh", gate, x)
    hidden = gated / (1 + np.exp(-gated)) * np.einsum("ehd,bsd->bseh", up, x)
    return np.einsum("bse,edh,bseh->bsd", shares, down, hidden)


# The errors of float32 in sums of 24 and 40 terms; bfloat16 has 8 bits.
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2**-6)])
@pytest.mark.parametrize(("batch", "seq", "per_token"), [(1, 1, 2), (2, 1, 5), (3, 7, 2), (1, 300, 1)])
def test_is_that_of_numpy(dtype, bound, batch, seq, per_token):
    module, x = layer(per_token=per_token, dtype=dtype), activations(batch, seq, dtype=dtype)
    y = applied(module, x)
    assert y.dtype == dtype
    assert relative_error(y, by_numpy(module, x)) < bound


def kept_by_numpy(chosen, is_token, capacity):
    """Goes through the tokens of each row in their order, and counts those of each expert."""
    kept = np.zeros(chosen.shape, bool)
    for row, tokens in enumerate(is_token):
        limit, counts = math.ceil(capacity * chosen.shape[-1] * tokens.sum() / 5), np.zeros(5, int)
        for column in np.flatnonzero(tokens):
            kept[row, column] = counts[chosen[row, column]] < limit
            counts[chosen[row, column]] += 1
    return kept


@pytest.mark.parametrize("capacity", [0.5, 1.25])
def test_a_capacity_drops_what_numpy_drops(capacity):
    module, x = dataclasses.replace(layer(), capacity=capacity), activations(3, 21)
    # Rows of all tokens, with padding at the end, and with padding between two sequences.
    is_token = np.arange(21) < np.asarray([[21], [9], [21]])
    is_token[2, 7:11] = False

    @eqx.filter_jit
    def dropping(module, x, positions):
        chosen, sums = module.routed(x, Context.init(ROUTED.rope, positions))
        return module.for_own_tokens(x, x.shape[1], chosen), sums

    y, sums = dropping(module, x, jnp.where(is_token, 0, -1))
    chosen = np.asarray(module.router(x)[0])
    kept = kept_by_numpy(chosen, is_token, capacity)
    assert 0 < (~kept[is_token]).sum() < kept[is_token].size
    assert relative_error(y, by_numpy(module, x, kept)) < 1e-6
    assert int(sums.tokens) == is_token.sum()
    np.testing.assert_allclose(sums.dropped, (~kept[is_token]).mean(1).sum(), rtol=1e-6)
    # Without `routed`, as in generation, nothing is dropped.
    np.testing.assert_array_equal(applied(module, x), applied(layer(), x))


def _used(module, x):
    return np.unique(np.asarray(module.router(x)[0])).tolist()


def test_experts_that_no_token_chose_are_not_computed():
    module, x = layer(), activations(1, 1)
    others = jnp.asarray([expert for expert in range(5) if expert not in _used(module, x)])
    assert len(others) == 3
    damaged = eqx.tree_at(
        lambda module: [one.weight.value for one in (module.gate_proj, module.up_proj, module.down_proj)],
        module,
        replace_fn=lambda value: value.at[others].set(jnp.nan),
    )
    np.testing.assert_array_equal(applied(damaged, x), applied(module, x))


def test_order_of_experts_does_not_matter():
    module, x, order = layer(), activations(3, 7), jnp.asarray([3, 0, 4, 1, 2])
    arrays, static = eqx.partition(module, eqx.is_array)
    permuted = eqx.combine(jax.tree.map(lambda array: array[order], arrays), static)
    assert relative_error(applied(permuted, x), applied(module, x)) < 1e-6


def test_with_one_expert_it_is_the_dense_layer():
    module, x = layer(experts=1, per_token=1), activations(2, 3)
    dense = small_model(config=dataclasses.replace(SMALL, layers=1, windows=(None,))).blocks[0].feed_forward
    dense = eqx.tree_at(
        lambda dense: [one.weight.value for one in (dense.gate_proj, dense.up_proj, dense.down_proj)],
        dense,
        [one.weight.value[0] for one in (module.gate_proj, module.up_proj, module.down_proj)],
    )
    assert relative_error(applied(module, x), applied(dense, x)) < 1e-6


def _readers_of_all_experts(text):
    """The operations of a compiled program that have arrays of all experts as operands, and make none."""
    whole = r"f32\[5,(?:40,24|24,40)\]"
    results = re.findall(rf"(%?[\w.-]+) = {whole}\S* ([\w-]+)\(", text)
    assert {operation for _, operation in results} <= {"parameter", "get-tuple-element", "bitcast"}
    names = {name for name, _ in results}
    return {
        match[1]
        for line in text.splitlines()
        if (match := re.search(r" = [^=]*? ([\w-]+)\((%.*?)\)", line))
        and names & set(re.findall(r"%[\w.-]+", match[2]))
    }


def _largest_written(text):
    inputs = ("parameter", "get-tuple-element")
    return max(size for operation, size, _ in written(text) if operation not in inputs)


@pytest.mark.skipif(native.instructions() is None, reason="The C++ kernels were not built.")
def test_the_kernel_copies_no_expert():
    prefill, text = (applied.lower(layer(), activations(1, seq)).compile().compiled.as_text() for seq in (300, 1))
    assert _readers_of_all_experts(prefill) == _readers_of_all_experts(text) == {"custom-call"}
    # Two rows of `hidden`, and nothing of the size of an expert.
    assert _largest_written(text) <= 2 * 40
    # Two rows meet three weights of an expert each.
    assert kernel_flops(text) >= 2 * 3 * 2 * 40 * 24


def test_decoding_without_the_kernel_reads_the_chosen_experts_only(monkeypatch):
    monkeypatch.setattr(native, "instructions", lambda: None)
    lowered = eqx.filter_jit(lambda module, x: module(x)).lower(layer(), activations(1, 1))
    text = lowered.compile().compiled.as_text()
    readers = _readers_of_all_experts(text)
    # The operand of a fusion or a loop is a parameter there, whose readers count too.
    assert "dynamic-slice" in readers
    assert readers <= {"dynamic-slice", "fusion", "while", "tuple", "get-tuple-element", "bitcast", "call"}
    assert _largest_written(text) == 40 * 24


def test_gradients_are_those_of_all_experts_weighted():
    module, x = layer(), activations(3, 7)
    arrays, static = eqx.partition(module, eqx.is_array)

    def routed(arrays, x):
        return jnp.sum(jnp.sin(eqx.combine(arrays, static)(x)))

    def all_experts(arrays, x):
        module = eqx.combine(arrays, static)
        chosen, shares = module.router(x)
        shares = jnp.sum(jax.nn.one_hot(chosen, 5) * shares[..., None], axis=2)
        gate, up = (jnp.einsum("ehd,bsd->bseh", one.weight.value, x) for one in (module.gate_proj, module.up_proj))
        down = module.down_proj.weight.value
        return jnp.sum(jnp.sin(jnp.einsum("bse,edh,bseh->bsd", shares, down, jax.nn.silu(gate) * up)))

    found, expected = (jax.jit(jax.grad(loss, argnums=(0, 1)))(arrays, x) for loss in (routed, all_experts))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < 1e-5


def test_grouped_product_with_empty_groups():
    draw = np.random.default_rng(0).standard_normal
    weights, x = (jnp.asarray(draw(shape), jnp.float32) for shape in ((4, 6, 5), (9, 5)))
    sizes = np.array([0, 5, 0, 3])
    y = contract_grouped(weights, x, jnp.asarray(sizes))
    expected = np.stack([weights[group] @ x[row] for row, group in enumerate(np.repeat(np.arange(4), sizes))])
    assert relative_error(y[:8], expected) < 1e-6


def test_cached_model_is_the_uncached_one():
    model = small_model(config=ROUTED)
    ids = np.random.default_rng(0).integers(0, SMALL.vocab, (2, 7)).astype(np.int32)
    expected, _ = run(model, ids)
    found, _ = run_in_pieces(model, ids, (5, 1, 1), empty_cache(model, 2, 7))
    assert relative_error(found, expected) < 1e-5
