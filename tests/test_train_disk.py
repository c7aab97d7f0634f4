"""Steps whose master weights and optimizer state are files: equal to those in memory, in less memory, and safe."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.model import small_model
from test_train_zero import CONFIG, batch

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.train import disk


OPTIMIZER = train.adamw(train.warmup_cosine(1e-2, warmup=1, steps=9))
# Two blocks in the layer pattern.
WINDOWS = dataclasses.replace(CONFIG, windows=(None, 5) * 2)


def in_memory(model, steps, **options):
    state, step = train.TrainState.init(model, OPTIMIZER), train.make_step(OPTIMIZER, **options)
    losses = []
    for number in range(steps):
        state, metrics = step(state, batch(number))
        losses.append(metrics.loss)
    return state, losses


def run(step, model, steps, state=None):
    """The state and the losses after so many steps, of which the files may have some already."""
    state, losses = step.init(model, dtype=jnp.float32) if state is None else state, []
    for number in range(int(state.steps), steps):
        state, metrics = step(state, batch(number))
        losses.append(metrics.loss)
    return state, losses


def weights(state):
    return jax.tree.leaves(eqx.filter(state.model, train.trained(state.model)))


def assert_equal(found, expected):
    for one, other in zip(weights(found), weights(expected), strict=True):
        np.testing.assert_array_equal(one, other.astype(one.dtype))


@pytest.mark.slow
def test_a_killed_process_continues_and_its_steps_are_those_in_memory(tmp_path, monkeypatch):
    """Bit for bit, with clipping, weight decay and a schedule."""
    model, write, written = small_model(config=CONFIG), disk._write, []
    expected, losses = in_memory(model, 3, remat="none")

    def killed(file, tree):
        write(file, tree)
        written.append(file)
        # Each step writes five files, as does the start: this is in the second step.
        if len(written) == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(disk, "_write", killed)
    step = train.DiskStep(OPTIMIZER, tmp_path, remat="none")
    with pytest.raises(KeyboardInterrupt):
        run(step, model, 3)
    found, others = run(step, model, 3)
    np.testing.assert_array_equal(others, losses[1:])
    assert_equal(found, expected)
    # A step that is not finite writes no weights.
    files = {file: file.read_bytes() for file in tmp_path.glob("*.?")}
    broken = batch(3)
    _, metrics = step(found, dataclasses.replace(broken, weights=broken.weights * np.nan))
    assert not bool(metrics.finite)
    assert {file: file.read_bytes() for file in tmp_path.glob("*.?")} == files
    state = step.init(model, dtype=jnp.float32)
    assert (int(state.steps), int(state.skipped)) == (4, 1)
    assert_equal(state, expected)


@pytest.mark.slow
def test_adapters_alone_are_trained_and_stored(tmp_path):
    """With a layer pattern, in two accumulated parts."""
    model = mx.apply_lora(small_model(config=WINDOWS), rank=2, alpha=4.0, key=jr.key(0))
    found = run(train.DiskStep(OPTIMIZER, tmp_path, accumulate=2), model, 2)
    expected = in_memory(model, 2, accumulate=2)
    np.testing.assert_array_equal(found[1], expected[1])
    assert_equal(found[0], expected[0])
    stored = sum(file.stat().st_size for file in tmp_path.glob("block-*"))
    numbers = sum(leaf.size for leaf in weights(found[0]))
    # Master weights and two moments in float32, twice. Each block has two more numbers, its counts of steps.
    counts = 2 * CONFIG.layers
    assert stored == 2 * 4 * (3 * numbers + counts)


@pytest.mark.slow
def test_in_bfloat16_memory_has_weights_gradients_and_a_few_blocks(tmp_path, monkeypatch):
    """The master weights are those of float32: without clipping, whose norm would be that of rounded gradients."""
    config = dataclasses.replace(CONFIG, layers=16, windows=(None,) * 16)
    model = small_model(config=config)
    expected, losses = in_memory(model, 2, clip=None)
    write, most = disk._write, []

    def watched(file, tree):
        most.append(sum(leaf.nbytes for leaf in jax.live_arrays()))
        write(file, tree)

    step = train.DiskStep(OPTIMIZER, tmp_path, clip=None)
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    state = step.init(model, dtype=jnp.bfloat16)
    monkeypatch.setattr(disk, "_write", watched)
    found, others = run(step, model, 2, state)
    del state
    np.testing.assert_array_equal(others, losses)
    assert_equal(found, expected)
    assert {leaf.dtype for leaf in weights(found)} == {jnp.dtype("bfloat16")}
    size = sum(leaf.nbytes for leaf in weights(found))
    block = max(file.stat().st_size for file in tmp_path.glob("*.0"))
    assert len(most) == 2 * 17
    assert max(most) - before <= 2 * size + 4 * block
    # In memory, master weights and moments take six times as much as weights in bfloat16.
    assert 2 * size + 4 * block < 6 * size


def test_what_cannot_be_trained_is_refused_in_one_sentence(tmp_path):
    model = small_model(config=CONFIG)
    step = train.DiskStep(OPTIMIZER, tmp_path)
    with pytest.raises(ValueError, match="on a mesh, and a DiskStep trains on one device; leave the mesh out"):
        step.init(mx.shard(model, mx.make_mesh("tp=2"), mx.HEADS))
    with pytest.raises(ValueError, match="make the state with its init"):
        step(train.TrainState.init(model, OPTIMIZER), batch(0))
    step.init(model)
    with pytest.raises(ValueError, match="those of another model or optimizer; take the same ones"):
        step.init(small_model(config=WINDOWS))
