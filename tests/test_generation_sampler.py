import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import count_compilations, refused
from fixtures.sharding import mesh, sharded
from hypothesis import given, settings, strategies as st

from mistral_eqx.generation import Sampler
from mistral_eqx.generation.sampler import gumbel
from mistral_eqx.parallel import Strategy, specs


DRAWS = 2000

filtered = eqx.filter_jit(lambda sampler, logits: sampler.filter(logits))
drawn = eqx.filter_jit(lambda sampler, logits, keys: sampler(logits, keys))


def draws(sampler, logits, key, number=DRAWS):
    """Many independent tokens for one row of logits."""
    return np.asarray(drawn(sampler, jnp.tile(jnp.asarray(logits)[None], (number, 1)), jr.split(key, number)))


def filter_by_definition(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None):
    """What `Sampler.filter` should do to one row, by sorting."""
    logits = logits.astype(np.float64) / temperature
    if top_k is not None:
        logits = np.where(logits < np.sort(logits)[::-1][: min(top_k, logits.size)][-1], -np.inf, logits)
    if top_p is not None:
        order = np.argsort(-logits, kind="stable")
        needed = 1 + int(np.argmax(np.cumsum(softmax(logits)[order]) >= top_p - 1e-12))
        logits = np.where(logits < logits[order[needed - 1]], -np.inf, logits)
    if min_p is not None:
        probabilities = softmax(logits)
        logits = np.where(probabilities < min_p * probabilities.max() * (1 - 1e-12), -np.inf, logits)
    if typical_p is not None:
        probabilities = softmax(logits)
        surprise = -np.log(np.where(probabilities > 0, probabilities, 1))
        distance = np.where(probabilities > 0, np.abs(surprise - np.sum(probabilities * surprise)), np.inf)
        order = np.argsort(distance, kind="stable")
        needed = 1 + int(np.argmax(np.cumsum(probabilities[order]) >= typical_p - 1e-12))
        logits = np.where(distance > distance[order[needed - 1]] + 1e-9, -np.inf, logits)
    return logits


def softmax(logits):
    exponentials = np.exp(logits - np.max(logits))
    return exponentials / exponentials.sum()


def assert_distributed(tokens, probabilities):
    """Pearson's test: what cannot be drawn is not, and the rest is as frequent as it should be."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * len(tokens)
    assert expected.min() > 5
    freedom = possible.sum() - 1
    # Above the mean by four standard deviations.
    assert np.sum((counts[possible] - expected) ** 2 / expected) < freedom + 4 * np.sqrt(2 * freedom)


# Probabilities of 1/2, 1/4, 1/8, 1/16, 1/16, in no order.
HALVES = np.log2(np.array([1 / 8, 1 / 2, 1 / 16, 1 / 4, 1 / 16], np.float32)) * np.log(2).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 100}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-50}, [1]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.7}, [1, 3]),
        ({"top_p": 0.8}, [0, 1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 2, "top_p": 0.7}, [1, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),
        # The temperature comes first: at 1/2 the probabilities are 1/4 : 1/16 : 1/64 : 1/256 : 1/256.
        ({"temperature": 0.5, "top_p": 0.7}, [1]),
        ({"temperature": 0.5, "top_p": 0.75}, [1, 3]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.77}, [1, 3]),
        ({"min_p": 0.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.2}, [0, 1, 3]),
        ({"min_p": 0.3}, [1, 3]),
        ({"min_p": 1.0}, [1]),
        # At the temperature 1/2 the second is a quarter as likely as the first.
        ({"temperature": 0.5, "min_p": 0.3}, [1]),
        # The mean surprise is 15/8 bits: that of 1/4 is nearest, then that of 1/2, of 1/8, and of 1/16.
        ({"typical_p": 0.01}, [3]),
        ({"typical_p": 0.2}, [3]),
        ({"typical_p": 0.3}, [1, 3]),
        ({"typical_p": 0.8}, [0, 1, 3]),
        ({"typical_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 2, "typical_p": 0.5}, [1]),
        # Two tokens share the border: both stay.
        ({"typical_p": 0.9}, [0, 1, 2, 3, 4]),
        ({"top_k": 4}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.9}, [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_which_tokens_stay(options, kept):
    logits = np.asarray(filtered(Sampler(**options), HALVES[None])[0])
    assert np.flatnonzero(np.isfinite(logits)).tolist() == kept
    np.testing.assert_allclose(logits[kept], HALVES[kept] / options.get("temperature", 1.0), rtol=1e-6)
    assert not np.isnan(logits).any()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    ties=st.booleans(),
    temperature=st.none() | st.floats(0.05, 5.0),
    top_k=st.sampled_from([None, 1, 7, 40, 1000]),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_the_filter_does_what_its_definition_says(seed, spread, ties, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=(3, 50)).astype(np.float32) * np.float32(spread)
    if ties:
        logits = np.round(logits)
    sampler = Sampler(temperature, top_k, top_p)
    actual = np.asarray(filtered(sampler, logits))
    for row, got in zip(logits, actual, strict=True):
        if sampler.greedy:
            np.testing.assert_array_equal(got, row)
            continue
        expected = filter_by_definition(row, temperature or 1.0, top_k, top_p)
        # A sum that is top_p but for rounding may fall on either side of it; a token less likely than this is
        # never drawn.
        doubtful = np.zeros(row.size, bool)
        if top_p is not None:
            after_top_k = filter_by_definition(row, temperature or 1.0, top_k)
            probabilities = softmax(after_top_k)
            before = np.array([probabilities[after_top_k > value].sum() for value in after_top_k])
            doubtful = (np.abs(before - top_p) < 1e-5) | ((probabilities < 1e-9) & (top_p > 1 - 1e-5))
        np.testing.assert_array_equal(np.isfinite(got)[~doubtful], np.isfinite(expected)[~doubtful])
        both = np.isfinite(got) & np.isfinite(expected)
        np.testing.assert_allclose(got[both], expected[both], rtol=1e-5)


def test_a_top_p_of_one_leaves_out_nothing_of_a_large_vocabulary(getkey):
    # Summed from the likeliest on, the probabilities of so many tokens reach 1 long before the last of them.
    logits = jr.normal(getkey(), (8, 50_000)) * 3
    assert np.isfinite(filtered(Sampler(top_p=1.0), logits)).all()


def test_top_p_tells_tokens_apart_that_are_nearly_as_likely():
    logits = np.concatenate([[-80], np.linspace(0, 1e-3, 50)]).astype(np.float32)
    # Each of fifty has a fiftieth of the probability; the last ones are the likeliest.
    for number in (5, 17, 26, 40, 49):
        kept = np.isfinite(filtered(Sampler(top_p=(number - 0.5) / 50), logits[None])[0])
        assert np.flatnonzero(kept).tolist() == list(range(51 - number, 51))


def test_a_sampler_without_arguments_takes_the_likeliest(getkey):
    logits = jr.normal(getkey(), (4, 50))
    best = np.argmax(logits, axis=-1).tolist()
    keys = jr.split(getkey(), 4)
    for sampler in (Sampler(), Sampler(temperature=0.0), Sampler(temperature=0.0, top_k=5, top_p=0.5)):
        assert sampler.greedy
        assert drawn(sampler, logits, keys).tolist() == best
        np.testing.assert_array_equal(sampler.filter(logits), logits)
    assert not any(sampler.greedy for sampler in (Sampler(temperature=0.1), Sampler(top_k=1), Sampler(top_p=0.1)))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    top_k=st.sampled_from([None, 7]),
    min_p=st.none() | st.floats(0.0, 1.0),
    typical_p=st.none() | st.floats(0.01, 0.99),
)
def test_min_p_and_typical_p_do_what_their_definitions_say(seed, spread, top_k, min_p, typical_p):
    logits = np.random.default_rng(seed).normal(size=(3, 50)).astype(np.float32) * np.float32(spread)
    actual = np.asarray(filtered(Sampler(1.0, top_k, None, min_p, typical_p), logits))
    for row, got in zip(logits, actual, strict=True):
        if typical_p is None:
            expected = filter_by_definition(row, 1.0, top_k, None, min_p)
            probabilities = softmax(row.astype(np.float64))
            doubtful = np.abs(probabilities / probabilities.max() - (min_p or 0)) < 1e-6
            np.testing.assert_array_equal(np.isfinite(got)[~doubtful], np.isfinite(expected)[~doubtful])
            continue
        # A sum that is typical_p but for rounding may fall on either side of it.
        below, above = (
            np.isfinite(filter_by_definition(row, 1.0, top_k, None, min_p, typical_p + change))
            for change in (-1e-5, 1e-5)
        )
        assert (np.isfinite(got) | ~below).all()
        assert (~np.isfinite(got) | above).all()
        assert np.isfinite(got).any()


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"typical_p": 0.6},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9},
    ],
    ids=str,
)
def test_a_split_vocabulary_draws_the_same(options, devices, getkey):
    sampler, strategy = Sampler(**options), Strategy("vocab@tp")
    logits, keys = jr.normal(getkey(), (20, 64)) * 3, jr.split(getkey(), 20)
    # Ties, also with a token of another device.
    logits = logits.at[:, 40].set(logits[:, 3]).at[5:, 63].set(jnp.max(logits[5:], axis=1))
    arrays = jax.tree.map(jnp.asarray, sampler)
    found, _ = sharded(
        lambda sampler, logits, keys: sampler(logits, jr.wrap_key_data(keys), strategy),
        mesh(devices),
        (arrays, logits, jr.key_data(keys)),
        (specs(arrays, strategy), jax.P(None, "tp"), jax.P()),
        jax.P(),
    )
    assert found.tolist() == drawn(sampler, logits, keys).tolist()


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-38, 1e-10, 1e10, 1e38, 1e300])
@pytest.mark.parametrize(
    "others", [{}, {"top_k": 20, "top_p": 0.99, "min_p": 0.0, "typical_p": 0.99}], ids=["alone", "together"]
)
def test_extreme_temperatures_are_greedy_or_uniform(temperature, others, getkey):
    logits = (jr.normal(getkey(), (50,)) * 10).at[3].set(0.0)
    sampler = Sampler(temperature=temperature, **others)
    assert np.isfinite(filtered(sampler, logits[None])).any()
    assert not np.isnan(filtered(sampler, logits[None])).any()
    tokens = draws(sampler, logits, getkey(), 1000)
    candidates = 20 if others else 50
    if temperature < 1:
        assert set(tokens.tolist()) == {int(np.argmax(logits))}
    else:
        assert len(set(tokens.tolist())) == candidates


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 3}],
    ids=str,
)
def test_draws_are_as_frequent_as_their_probabilities(options, getkey):
    probabilities = softmax(filter_by_definition(HALVES, **options))
    assert_distributed(draws(Sampler(**options), HALVES, getkey()), probabilities)


def test_trap_categorical_of_softmax_undoes_the_top_p_filter(getkey):
    # A softmax turns what was left out into a logit of 0, not far below the largest one of at most 1.
    logits = np.linspace(0, 5, 50, dtype=np.float32)
    sampler = Sampler(top_p=0.5)
    nucleus = np.isfinite(filter_by_definition(logits, top_p=0.5))
    assert 2 <= nucleus.sum() <= 10
    tokens = draws(sampler, logits, getkey())
    assert nucleus[tokens].all()
    # Nor are the tokens inside it made as likely as each other.
    assert_distributed(tokens, softmax(filter_by_definition(logits, top_p=0.5)))


@pytest.fixture(params=["whole", "split"])
def number_drawn(request):
    """Draws tokens for one row of logits, on one device and with a part of the vocabulary on each of four."""

    def whole(sampler, logits, keys):
        return drawn(sampler, jnp.tile(logits[None], (keys.shape[0], 1)), keys)

    def split(sampler, logits, keys):
        strategy, arrays = Strategy("vocab@tp"), jax.tree.map(jnp.asarray, sampler)
        found, _ = sharded(
            lambda sampler, logits, keys: sampler(
                jnp.tile(logits[None], (keys.shape[0], 1)), jr.wrap_key_data(keys), strategy
            ),
            mesh(4),
            (arrays, logits, jr.key_data(keys)),
            (specs(arrays, strategy), jax.P("tp"), jax.P()),
            jax.P(),
        )
        return found

    return {"whole": whole, "split": split}[request.param]


def test_noise_is_as_likely_as_it_should_be_to_its_far_end():
    """Of each number that 32 bits can be, small ones one by one: what share of them is below is what is drawn above."""
    small, large = np.arange(5000), np.geomspace(5000, 2**32 - 1, 5000)
    bits = np.unique(np.concatenate([small, large.astype(np.int64), 2**32 - 1 - small]))
    noise = np.asarray(gumbel(jnp.asarray(bits, jnp.uint32)), np.float64)
    assert np.isfinite(noise).all()
    assert noise.max() > 22
    share = (bits + 0.5) / 2**32
    np.testing.assert_allclose(1 - np.exp(-np.exp(-noise)), share, rtol=2e-5, atol=0)
    # Where all but few are below, what counts is the share above; that of the last 32 is too small for a float32.
    np.testing.assert_allclose(np.exp(-np.exp(-noise)), 1 - share, rtol=2e-5, atol=2.0**-24)


@pytest.mark.slow
def test_a_long_tail_is_drawn_as_often_as_it_is_likely(number_drawn, getkey):
    """131,071 tokens have 1 % together, each a thirteen millionth."""
    share, rows, batches = 0.01, 100, 50
    logits, others = jnp.log(jnp.full(131_072, share / 131_071)).at[0].set(jnp.log(1 - share)), 0
    for key in jr.split(getkey(), batches):
        others += int((np.asarray(number_drawn(Sampler(1.0), logits, jr.split(key, rows))) > 0).sum())
    # 50 are right; 21 come of noise that ends near 15.9.
    expected = share * rows * batches
    assert abs(others - expected) < 3 * np.sqrt(expected)


@pytest.mark.parametrize("temperature", [1e-5, 1e-20])
def test_equal_logits_are_drawn_alike_at_a_low_temperature(temperature, number_drawn, getkey):
    logits = jnp.full(64, -2.0).at[jnp.asarray([9, 50])].set(3.1)
    tokens = np.asarray(number_drawn(Sampler(temperature), logits, jr.split(getkey(), DRAWS)))
    assert set(tokens.tolist()) == {9, 50}
    assert abs((tokens == 9).sum() - DRAWS / 2) < 3.5 * np.sqrt(DRAWS) / 2


def test_logits_that_differ_by_their_last_digit_are_not_equal_at_a_low_temperature(getkey):
    # Their quotients are 0.24 apart, where a float32 near 310,000 is 0.03 apart from the next.
    logits = np.array([-2.0, np.nextafter(np.float32(3.1), np.float32(4)), 3.1], np.float32)
    odds = np.exp((logits[1] - logits[2]).astype(np.float64) / 1e-6)
    tokens = draws(Sampler(1e-6), logits, getkey())
    assert_distributed(tokens[tokens > 0] - 1, np.array([odds, 1]) / (1 + odds))


def test_trap_temperature_alone_crashed(getkey):
    for options in ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}):
        tokens = drawn(Sampler(**options), jr.normal(getkey(), (2, 50)), jr.split(getkey(), 2))
        assert tokens.shape == (2,)
        assert tokens.dtype == jnp.int32


def test_a_row_draws_what_it_draws_alone(getkey):
    logits, keys = jr.normal(getkey(), (8, 50)), jr.split(getkey(), 8)
    sampler = Sampler(temperature=2.0, top_k=30, top_p=0.95)
    together = drawn(sampler, logits, keys)
    alone = [drawn(sampler, logits[row : row + 1], keys[row : row + 1])[0] for row in range(8)]
    assert together.tolist() == [int(token) for token in alone]
    # Equal rows with keys of their own draw on their own.
    assert len(set(draws(sampler, logits[0], getkey(), 100).tolist())) > 10


def test_another_temperature_or_top_p_compiles_nothing(getkey):
    logits, keys = jr.normal(getkey(), (2, 50)), jr.split(getkey(), 2)
    drawn(Sampler(temperature=0.7, top_k=10, top_p=0.9), logits, keys)
    with count_compilations() as compiled:
        cold = drawn(Sampler(temperature=1e-3, top_k=10, top_p=1.0), logits, keys)
        drawn(Sampler(top_k=10, top_p=0.2), logits, keys)
    assert not compiled
    # It was not forgotten either.
    assert cold.tolist() == np.argmax(logits, axis=-1).tolist()
    with count_compilations() as compiled:
        drawn(Sampler(top_k=11, top_p=0.2), logits, keys)
    assert compiled.total() == 1


def test_a_sampler_is_a_pytree_with_two_arrays():
    first, second = Sampler(temperature=0.5, top_k=3, top_p=0.9), Sampler(temperature=0.7, top_k=3, top_p=0.8)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert [leaf.dtype for leaf in jax.tree.leaves(first)] == [np.float32, np.float32]
    assert jax.tree.leaves(Sampler()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, ["temperature is -0.1", "at least 0", "0 is greedy"]),
        ({"temperature": float("inf")}, ["temperature is inf"]),
        ({"temperature": float("nan")}, ["temperature is nan"]),
        ({"top_k": 0}, ["top_k is 0", "at least 1"]),
        ({"top_k": -3}, ["top_k is -3", "at least 1"]),
        ({"top_k": 2.5}, ["top_k is 2.5", "whole number"]),
        ({"top_p": 0.0}, ["top_p is 0.0", "greater than 0"]),
        ({"top_p": 1.5}, ["top_p is 1.5", "at most 1"]),
        ({"top_p": -0.5}, ["top_p is -0.5"]),
        ({"top_p": float("nan")}, ["top_p is nan"]),
        ({"min_p": -0.1}, ["min_p is -0.1", "at least 0"]),
        ({"min_p": 1.1}, ["min_p is 1.1", "at most 1"]),
        ({"typical_p": 0.0}, ["typical_p is 0.0", "greater than 0"]),
        ({"typical_p": float("nan")}, ["typical_p is nan"]),
        # A greedy sampler does not hide a mistake.
        ({"temperature": 0, "top_p": 2}, ["top_p is 2"]),
    ],
    ids=str,
)
def test_values_outside_their_range_are_refused(options, words):
    with refused(*words):
        Sampler(**options)


@pytest.mark.parity
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 5000},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"temperature": 0.6, "top_k": 40},
        {"temperature": 1.5, "top_p": 0.8},
        {"top_k": 20, "top_p": 0.5},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    ],
    ids=str,
)
def test_the_filter_equals_that_of_transformers(options, ties, getkey):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.array(jr.normal(getkey(), (16, 1000)) * 4)
    if ties:
        logits = np.round(logits * 4) / 4
    warpers = [("temperature", "Temperature"), ("top_k", "TopK"), ("top_p", "TopP")]
    scores = torch.from_numpy(logits)
    for option, name in warpers:
        if option in options:
            scores = getattr(process, f"{name}LogitsWarper")(options[option])(None, scores)
    expected = scores.numpy()
    actual = np.asarray(filtered(Sampler(**options), logits))
    assert np.isfinite(expected).any()
    if not ties:
        np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    for got, theirs in zip(actual, expected, strict=True):
        both = np.isfinite(got) & np.isfinite(theirs)
        assert both.sum() == np.isfinite(theirs).sum()
        np.testing.assert_allclose(got[both], theirs[both], rtol=1e-6)
        # Of several tokens at the border transformers keeps some by the order of its sort; here they all stay.
        assert (got[np.isfinite(got) & ~both] == got[both].min()).all()
