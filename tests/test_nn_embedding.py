import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import numpy_reference as reference
from fixtures.model import SMALL, relative_error, small_model
from fixtures.sharding import mesh, sharded
from jax.sharding import PartitionSpec as P

from mistral_eqx.parallel import Strategy, specs, with_strategy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_float32(dtype):
    """In bfloat16 two of the largest logits would often be equal."""
    head = small_model(dtype=dtype).head
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 24)), dtype)
    logits = eqx.filter_jit(head)(x)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, np.asarray(x, np.float64) @ reference.array(head).T) < 2e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_a_table_that_is_used(dtype):
    table = small_model(dtype=dtype).embedding
    ids = jnp.asarray([[1, 2, 1]], jnp.int32)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda table: jnp.sum(table(ids).astype(jnp.float32))))(table)
    expected = np.zeros(table.weight.value.shape)
    expected[1], expected[2] = 2, 1
    np.testing.assert_array_equal(np.asarray(gradient.weight.value, np.float64), expected)


def test_a_tied_head_shares_its_table():
    model = small_model(config=dataclasses.replace(SMALL, tied=True))
    assert model.head is None
    changed = eqx.tree_at(lambda model: model.embedding.weight.value, model, replace_fn=lambda value: 2 * value)
    x = jnp.ones((1, 1, 24))
    np.testing.assert_allclose(changed.logits(x), 2 * model.logits(x), rtol=1e-6)
    assert len([leaf for leaf in jax.tree.leaves(model) if eqx.is_array(leaf) and leaf.shape == (61, 24)]) == 1


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_trap_sharding_that_silently_does_nothing_to_the_vocabulary(devices):
    """A device that took its part of the table for the whole would give wrong rows without a word."""
    model = small_model(config=dataclasses.replace(SMALL, vocab=64))
    ids = jnp.asarray([[0, 1, 63, 31, 32]], jnp.int32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 24)), jnp.float32)
    strategy = Strategy("vocab@tp")

    def apply(layers, ids, x):
        embedding, head = layers
        return embedding(ids), head(x)

    layers = model.embedding, model.head
    rows, logits = eqx.filter_jit(apply)(layers, ids, x)
    split = with_strategy(layers, strategy)
    in_specs, out_specs = (specs(split, strategy), P(), P()), (P(), strategy.spec("batch seq vocab"))
    (found_rows, found_logits), collectives = sharded(apply, mesh(devices), (split, ids, x), in_specs, out_specs)
    assert collectives == {"all_reduce": 1}
    np.testing.assert_array_equal(found_rows, rows)
    assert relative_error(found_logits, logits) < 1e-6
    assert found_logits.addressable_shards[0].data.shape == (1, 5, 64 // devices)
