"""A stacked model is the model."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import SMALL, relative_error, small_model

from mistral_eqx.nn import stack, unstack
from mistral_eqx.train import causal, one_a_row, pack, prefix_lm, rematerialised


def _texts(*lengths):
    draw = np.random.default_rng(0)
    return [draw.integers(0, SMALL.vocab, length) for length in lengths]


@eqx.filter_jit
def _hidden(stacked, batch):
    return stacked.hidden(batch.inputs, batch.positions, batch.span)


@pytest.mark.parametrize(("windows", "size"), [((None,) * 4, 1), ((None, 3, None, 3), 2), ((3, None, None), 3)])
@pytest.mark.slow
def test_a_stacked_model_says_the_same(windows, size):
    """Blocks that differ by a layer pattern are stacked over its repeats."""
    model = small_model(config=dataclasses.replace(SMALL, layers=len(windows), windows=windows))
    stacked = stack(model)
    assert len(stacked.pattern) == size
    batch = jax.tree.map(jnp.asarray, pack([prefix_lm(text, 3) for text in _texts(8, 5, 9)], 12))
    expected, _ = eqx.filter_jit(lambda model, batch: model.hidden(batch.inputs, batch.positions, span=batch.span))(
        model, batch
    )
    # The same operations in another program, in float32.
    assert relative_error(_hidden(stacked, batch), expected) < 2e-6
    again = unstack(stacked)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    for one, other in zip(*(jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (again, model)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_packed_text_is_read_as_if_alone():
    stacked = stack(small_model(config=dataclasses.replace(SMALL, windows=(None, 4))))
    examples = [causal(text) for text in _texts(7, 4, 6)]
    packed, alone = (jax.tree.map(jnp.asarray, make(examples, 16)) for make in (pack, one_a_row))
    found, expected = _hidden(stacked, packed), _hidden(stacked, alone)
    for row, start, length in ((0, 0, 6), (1, 6, 3), (2, 9, 5)):
        assert relative_error(found[0, start : start + length], expected[row, :length]) < 2e-6


def _gradient(layers, remat):
    model = stack(small_model(config=dataclasses.replace(SMALL, layers=layers, windows=(None,) * layers)))
    batch = jax.tree.map(jnp.asarray, one_a_row([causal(text) for text in _texts(33, 33)], 32))
    wrapped = rematerialised(remat)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model, batch):
        return jnp.sum(model.hidden(batch.inputs, batch.positions, batch.span, wrapped=wrapped) ** 3)

    return gradient.lower(model, batch), (model, batch)


@pytest.mark.slow
def test_rematerialisation_trades_memory_and_changes_nothing():
    memory, gradients = {}, {}
    for remat in ("none", "dots", "block"):
        lowered, inputs = _gradient(8, remat)
        program = lowered.compile()
        memory[remat] = program.compiled.memory_analysis().temp_size_in_bytes
        gradients[remat] = jax.tree.leaves(eqx.filter(program(*inputs), eqx.is_array))
    for remat in ("dots", "block"):
        for one, other in zip(gradients[remat], gradients["none"], strict=True):
            # Float32.
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())
    assert memory["block"] < 0.8 * memory["dots"] < 0.64 * memory["none"]
    with pytest.raises(ValueError, match="no rematerialisation policy 'all'; take one of 'none', 'block', 'dots'"):
        _gradient(1, "all")


def test_a_program_does_not_grow_with_the_layers():
    few, many = (_gradient(layers, "block")[0].as_text().splitlines() for layers in (4, 8))
    assert len(few) == len(many)
