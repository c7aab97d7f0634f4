"""The promise: every strategy gives what one device gives.

The default suite compares a few pairs of a model and a strategy, always the same. The long run compares others each
time: `EQUALITY_PAIRS=600 pytest tests/test_equality.py`.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.equality import (
    FLOAT64_BOUND,
    ROUNDINGS,
    TALLY,
    any_config,
    any_strategies,
    forget_programs,
    logits_and_gradients,
    on,
    precision,
    random_model,
    rounding,
    thorough,
    worst_error,
)
from hypothesis import given, strategies as st

import mistral_eqx as mx


SAMPLERS = [
    mx.Sampler(),
    mx.Sampler(temperature=0.7),
    mx.Sampler(temperature=1.5, top_k=5),
    mx.Sampler(top_p=0.6),
    mx.Sampler(temperature=0.9, top_k=30, top_p=0.8),
]
# Of its own draws hypothesis repeats many: it draws a seed, which draws all the rest.
_SEEDS = st.integers(0, 2**32 - 1).map(random.Random)


@pytest.fixture(scope="module", autouse=True)
def _summary(request):
    manager = request.config.pluginmanager
    if not manager.is_registered(TALLY):
        manager.register(TALLY)


def _compare_logits_and_gradients(random, dtype):
    forget_programs()
    config = any_config(random)
    batch, seq = random.choice([1, 2, 3, 4, 6, 8]), random.randint(1, 9)
    pairs = any_strategies(random, config, batch)
    draw = np.random.default_rng(seq).integers
    ids, targets = (jnp.asarray(draw(0, config.vocab, (batch, seq)), jnp.int32) for _ in range(2))
    with precision(dtype):
        model = random_model(config, dtype)
        expected = logits_and_gradients(model, ids, targets)
        assert expected[0].dtype == dtype
        for kind, strategy, axes in pairs:
            found = logits_and_gradients(on(model, strategy, axes), ids, targets)
            logits, gradients = (worst_error(one, other) for one, other in zip(found, expected, strict=True))
            units = ROUNDINGS * rounding(config, seq, dtype)
            TALLY.add(
                f"{dtype} logits and gradients",
                kind,
                config,
                strategy,
                axes,
                logits=logits,
                gradients=gradients,
                **{"of the bound": max(logits, gradients) / units},
            )
            bound = FLOAT64_BOUND if dtype == "float64" else units
            assert logits < bound, (strategy, axes)
            assert gradients < bound, (strategy, axes)


@pytest.mark.slow
@thorough(14, part=0.6)
@given(_SEEDS)
def test_logits_and_gradients_are_those_of_one_device_to_12_digits(random):
    _compare_logits_and_gradients(random, "float64")


@thorough(5, part=0.2)
@given(_SEEDS)
def test_logits_and_gradients_are_those_of_one_device_but_for_rounding(random):
    _compare_logits_and_gradients(random, "float32")


@pytest.mark.slow
@thorough(5, part=0.2)
@given(_SEEDS)
def test_tokens_are_those_of_one_device(random):
    """Greedy and sampled, for prompts of several lengths, of which one ends early."""
    forget_programs()
    config = any_config(random)
    batch, longest = random.randint(1, 4), random.randint(1, 20)
    sampler = random.choice(SAMPLERS)
    pairs = any_strategies(random, config, batch)
    draw = np.random.default_rng(longest).integers
    prompts = [draw(0, config.vocab, draw(1, longest + 1)).tolist() for _ in range(batch)]
    # In float64, where no two logits are so close that another order of sums exchanges them.
    with precision("float64"):
        model = random_model(config, "float64")

        def generate(model, end):
            return mx.generate(
                model, prompts, max_new_tokens=7, sampler=sampler, eos_id=end, key=jax.random.key(longest)
            )

        end = int(generate(model, 0).tokens[0, 2])
        expected = generate(model, end)
        assert int(expected.lengths[0]) <= 3
        for kind, strategy, axes in pairs:
            found = generate(on(model, strategy, axes), end)
            TALLY.add("tokens", kind, config, strategy, axes)
            np.testing.assert_array_equal(found.tokens, expected.tokens, f"{strategy} {axes}")
            np.testing.assert_array_equal(found.lengths, expected.lengths, f"{strategy} {axes}")
