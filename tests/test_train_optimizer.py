"""What is decayed, and how learning rates run. The numbers of AdamW are torch's: see test_train_parity.py."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import SMALL, small_model

from mistral_eqx.nn import stack
from mistral_eqx.train import adamw, decayed, trained, warmup_cosine, wsd


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.slow
def test_matrices_alone_are_decayed(tied):
    """By what a weight does: with gradients of nothing, a step is the decay."""
    model = stack(small_model(config=dataclasses.replace(SMALL, tied=tied)))
    weights = eqx.filter(model, trained(model))
    optimizer = adamw(0.5, weight_decay=0.2)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="."): (weight, update)
        for (path, weight), update in zip(jax.tree.leaves_with_path(weights), jax.tree.leaves(updates), strict=True)
    }
    moved = {name for name, (_, update) in names.items() if np.any(update)}
    linear = {f"attention.{x}_proj" for x in "qkvo"} | {f"feed_forward.{x}_proj" for x in ("gate", "up", "down")}
    expected = {f"pattern.0.{name}.weight.value" for name in linear}
    assert moved == (expected if tied else expected | {"outer.head.weight.value"})
    for name in moved:
        weight, update = names[name]
        np.testing.assert_allclose(update, -0.1 * weight, rtol=1e-6)
    assert sum(map(bool, jax.tree.leaves(decayed(weights)))) == len(moved)


def test_a_cosine_after_a_warmup():
    schedule = warmup_cosine(2.0, warmup=4, steps=12, end=0.5)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [0.5, 1, 1.5, 2])
    np.testing.assert_allclose(schedule(4), 2)
    np.testing.assert_allclose(schedule(8), 1.25, rtol=1e-6)
    np.testing.assert_allclose([schedule(12), schedule(50)], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(warmup_cosine(2.0, warmup=0, steps=2)(0), 2)
    with pytest.raises(ValueError, match="5 steps of warmup leave none of 5"):
        warmup_cosine(1.0, warmup=5, steps=5)


def test_warmup_stable_decay():
    schedule = wsd(2.0, warmup=2, decay=4, steps=10)
    found = [float(schedule(step)) for step in range(12)]
    np.testing.assert_allclose(found, [1, 2, 2, 2, 2, 2, 2, 1.5, 1, 0.5, 0, 0], atol=1e-6)
    with pytest.raises(ValueError, match=r"2 \+ 4 steps are not within 5"):
        wsd(1.0, warmup=2, decay=4, steps=5)
