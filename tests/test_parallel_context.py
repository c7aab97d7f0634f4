"""Context parallelism: the tokens of a row over devices, in attention too."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fixtures.equality import FLOAT64_BOUND, logits_and_gradients, on, precision, random_model, worst_error
from fixtures.generation import refused
from fixtures.latent import LATENT
from fixtures.model import SMALL, small_model
from fixtures.sharding import mesh, sharded
from jax.sharding import AbstractMesh, PartitionSpec
from test_parallel_communication import CONFIG as COMMUNICATION, _counted, _forward, _on, _prefill

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.nn import Span, attention as layer, stack
from mistral_eqx.nn.ring import ring_hops
from mistral_eqx.parallel import all_slices, in_order, own_slices, with_auto_axes, with_strategy
from mistral_eqx.parallel.mesh import make_mesh
from mistral_eqx.planning import communication


RING, GATHER = "seq@cp kv_seq@cp", "seq@cp"
WITH_ALL = "kv_heads@tp hidden@tp vocab@tp batch@dp"
THREE = {"dp": 2, "cp": 2, "tp": 2}
CONFIG = dataclasses.replace(SMALL, vocab=64, windows=(3, None))
SEQ = 32


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def _zigzag(seq, devices):
    """The columns of each device."""
    slices = np.arange(seq).reshape(2 * devices, -1)
    return [np.concatenate([slices[at], slices[2 * devices - 1 - at]]) for at in range(devices)]


# The order of tokens.


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_device_has_two_slices_and_gives_them_back(devices):
    strategy, columns = mx.Strategy("seq@cp"), jnp.arange(12 * devices)

    def program(columns):
        own = own_slices(columns, strategy, axis=0)
        before = own_slices(columns, strategy, axis=0, hop=1)
        both = all_slices(own[None], strategy, axis=1)[0]
        return own, before, in_order(own[None], strategy)[0], both

    spec = PartitionSpec("cp")
    (own, before, back, whole), counts = sharded(
        program, mesh(devices, "cp"), (columns,), (PartitionSpec(),), (spec, spec, spec, spec)
    )
    expected = _zigzag(12 * devices, devices)
    np.testing.assert_array_equal(np.asarray(own).reshape(devices, -1), expected)
    np.testing.assert_array_equal(np.asarray(before).reshape(devices, -1), np.roll(expected, 1, axis=0))
    np.testing.assert_array_equal(back, columns)
    np.testing.assert_array_equal(np.asarray(whole).reshape(devices, -1), np.tile(columns, (devices, 1)))
    assert counts == {"collective_permute": 2, "all_gather": 1}


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_in_a_zigzag_causal_work_is_even(devices):
    """Pairs of a query and a key that it attends to: of each device, and of each device at each hop of the ring."""
    seq = 16 * devices
    orders = {"contiguous": np.arange(seq).reshape(devices, -1), "zigzag": np.asarray(_zigzag(seq, devices))}
    worst, slowest = {}, {}
    for name, columns in orders.items():
        pairs = np.asarray(
            [
                [(keys[None, :] <= queries[:, None]).sum() for keys in (columns[at - hop] for hop in range(devices))]
                for at, queries in enumerate(columns)
            ]
        )
        assert pairs.sum() == seq * (seq + 1) // 2
        worst[name] = pairs.sum(axis=1).max() / pairs.sum(axis=1).mean()
        # All devices wait for the slowest one at each hop.
        slowest[name] = pairs.max(axis=0).sum() / pairs.sum(axis=1).mean()
    assert worst["zigzag"] == slowest["zigzag"] == 1
    # The last of n devices has the work of 2 n - 1 halves, the mean is n.
    assert worst["contiguous"] == pytest.approx(2 - 1 / devices, rel=0.05)
    # At each hop but the first, a device attends to all keys of another one.
    assert slowest["contiguous"] == pytest.approx(2 - 1 / devices, rel=0.05)


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_hops_that_a_window_cannot_reach_are_skipped_and_no_others(devices):
    for size in (1, 2, 4):
        seq = 2 * size * devices
        columns = _zigzag(seq, devices)
        for window in (1, 2, 3, size, size + 1, size + 2, 2 * size + 1, 3 * size + 2, seq, None):
            distance = seq if window is None else window
            met = [
                hop
                for hop in range(devices)
                if any(
                    (np.abs(own[:, None] - columns[at - hop][None, :]) < distance).any()
                    for at, own in enumerate(columns)
                )
            ]
            assert ring_hops(window, seq, devices) == met, (size, window)


# The results of one device.


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        (RING, {"cp": 4}),
        _slow(f"{WITH_ALL} {GATHER}", THREE),
        # Tokens between the layers are split over another axis.
        _slow(f"{mx.SEQUENCE_PARALLEL.layout} {RING}", {"cp": 2, "tp": 2}),
        _slow("seq@a,b kv_seq@a,b head_dim@c", {"a": 2, "b": 2, "c": 2}),
    ],
)
def test_logits_and_gradients_are_those_of_one_device(layout, axes):
    draw = np.random.default_rng(0).integers
    ids, targets = (jnp.asarray(draw(0, CONFIG.vocab, (2, SEQ)), jnp.int32) for _ in range(2))
    with precision("float64"):
        model = random_model(CONFIG, "float64")
        expected = logits_and_gradients(model, ids, targets)
        found = logits_and_gradients(on(model, mx.Strategy(layout), axes), ids, targets)
        assert worst_error(found[0], expected[0]) < FLOAT64_BOUND
        assert worst_error(found[1], expected[1]) < FLOAT64_BOUND


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "config"), [(RING, LATENT), (GATHER, CONFIG)], ids=["ring, latents", "gather"])
def test_in_tiles_and_with_latent_attention_and_experts(layout, config, monkeypatch):
    monkeypatch.setattr(layer, "_WHOLE", 0)
    draw = np.random.default_rng(0).integers
    ids, targets = (jnp.asarray(draw(0, 60, (1, SEQ)), jnp.int32) for _ in range(2))
    with precision("float64"):
        model = random_model(config, "float64")
        expected = logits_and_gradients(model, ids, targets)
        found = logits_and_gradients(on(model, mx.Strategy(f"{layout} vocab@tp"), {"cp": 2, "tp": 2}), ids, targets)
        assert worst_error(found[0], expected[0]) < FLOAT64_BOUND
        assert worst_error(found[1], expected[1]) < FLOAT64_BOUND


@pytest.mark.long
def test_positions_and_spans_are_those_of_the_whole_row():
    draw, model = np.random.default_rng(0), small_model(config=CONFIG)
    ids = jnp.asarray(draw.integers(0, CONFIG.vocab, (2, SEQ)), jnp.int32)
    # Padding on the left, as of prompts: the mask follows positions, and no hop is known to be skipped.
    padded = jnp.asarray(np.maximum(np.arange(SEQ)[None] - np.array([[5], [0]]), -1), jnp.int32)
    columns = jnp.broadcast_to(jnp.arange(SEQ, dtype=jnp.int32), ids.shape)
    for positions, span in (
        (padded, None),
        (None, Span(last=jnp.maximum(columns, 20))),
        (None, Span(last=jnp.full_like(columns, SEQ - 1))),
        (columns % 11, Span(first=columns // 11 * 11)),
    ):
        run = eqx.filter_jit(lambda model, positions, span: model.hidden(ids, positions, span=span)[0])
        expected = run(model, positions, span)
        for layout in (RING, GATHER):
            found = run(on(model, mx.Strategy(layout), {"cp": 4}), positions, span)
            assert found.sharding.shard_shape(found.shape)[1] == SEQ // 4
            real = np.ones(ids.shape, bool) if positions is None else np.asarray(positions) >= 0
            # Float32 sums in another order.
            np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], rtol=2e-4, atol=2e-5)


# Training.


def _batch(seed, rows):
    """Packed documents, causal, with a prefix, and bidirectional; rows count unequally and have padding."""
    draw = np.random.default_rng(seed)
    examples = []
    for _ in range(2 * rows):
        ids = draw.integers(0, CONFIG.vocab, draw.integers(6, 16))
        examples += [train.causal(ids), train.prefix_lm(ids, 4), train.bert_mask(ids, draw, mask_id=1, vocab=64)]
    return jax.tree.map(lambda x: x[:rows], train.pack(examples, SEQ))


def _gradient(model, *, zero=0, **options):
    """The gradient of the training loss: with this optimizer, what a step subtracts from the weights."""
    optimizer = optax.sgd(1.0)
    state = train.TrainState.init(model, optimizer, dtype=jnp.float64, zero=zero)
    step = train.make_step(optimizer, compute_dtype=None, clip=None, **options)
    state, metrics = step(state, _batch(0, 4))
    before, after = (eqx.filter(x, train.trained(x)) for x in (stack(model), state.model))
    return metrics, jax.tree.map(lambda one, other: np.asarray(one) - np.asarray(other), before, after)


@pytest.mark.parametrize(
    ("layout", "axes", "options"),
    [
        _slow(f"{GATHER} batch@dp", {"dp": 2, "cp": 2}, {"zero": 3, "accumulate": 2}),
        _slow(f"{WITH_ALL} {RING}", THREE, {"zero": 2, "accumulate": 2}),
        pytest.param(
            RING,
            {"cp": 4},
            {"zero": 3, "remat": "dots", "label_smoothing": 0.1, "z_loss": 1e-3},
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_gradient_of_the_training_loss_is_that_of_one_device(layout, axes, options):
    with precision("float64"):
        model = random_model(CONFIG, "float64")
        alone = {name: value for name, value in options.items() if name != "zero"}
        metrics, expected = _gradient(model, **alone)
        found, gradient = _gradient(on(model, mx.Strategy(layout), axes), **options)
        np.testing.assert_allclose(found, metrics, rtol=FLOAT64_BOUND)
        # Weights near 1 have 16 digits, and their gradients near 0.01 then 14.
        assert worst_error(gradient, expected) < FLOAT64_BOUND


@pytest.mark.long
def test_adapters_drop_the_same_entries():
    with precision("float64"):
        model = random_model(CONFIG, "float64")
        model = mx.apply_lora(
            model, rank=2, alpha=4.0, targets=("q_proj", "down_proj"), dropout=0.5, dtype=jnp.float64, key=jr.key(0)
        )
        model = jax.tree.map(lambda x: x + 0.1 if eqx.is_inexact_array(x) else x, model)
        metrics, expected = _gradient(model)
        found, gradient = _gradient(on(model, mx.Strategy(f"batch@dp {RING}"), {"dp": 2, "cp": 2}), zero=3)
        np.testing.assert_allclose(found, metrics, rtol=FLOAT64_BOUND)
        assert worst_error(gradient, expected) < FLOAT64_BOUND


@pytest.mark.slow
def test_an_evaluation_is_that_of_one_device():
    def sums(model):
        state = train.TrainState.init(model, optax.sgd(1.0))
        return train.make_evaluation(compute_dtype=None)(state, _batch(0, 4))

    model = small_model(config=CONFIG)
    # Float32 sums in another order.
    np.testing.assert_allclose(sums(on(model, mx.Strategy(RING), {"cp": 4})), sums(model), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [RING, GATHER])
def test_tokens_are_those_of_one_device(layout):
    """Window caches, or a cache that is not split: devices compute all tokens."""
    model, prompts = small_model(config=CONFIG), [[5, 9, 2, 33, 1], [7, 7]]
    expected = mx.generate(model, prompts, max_new_tokens=9, eos_id=()).tokens
    found = mx.generate(on(model, mx.Strategy(layout), {"cp": 4}), prompts, max_new_tokens=9, eos_id=()).tokens
    np.testing.assert_array_equal(found, expected)


# What is exchanged, and what is refused.


def test_a_ring_sends_keys_and_a_window_sends_fewer():
    """Mistral 7B in bfloat16, 8192 tokens over 8 devices: 1024 tokens of 8 heads of 128 numbers on each."""
    sizes = {"batch": 1, "seq": 8192}
    seven = dataclasses.replace(mx.PRESETS["7b-v0.2"], windows=(None,) * 32)
    ring = communication.forward_pass(seven, mx.Strategy(RING), {"cp": 8}, **sizes)
    own = 1024 * 8 * 128 * 2
    assert [(one.what, one.count, one.bytes) for one in ring] == [
        ("keys and values on the ring", 32 * 2 * 7, own),
        ("last output in order", 2, 512 * 4096 * 2),
    ]
    gathered = communication.forward_pass(seven, mx.Strategy(GATHER), {"cp": 8}, **sizes)
    assert [(one.kind, one.count, one.bytes, one.devices) for one in gathered[:1]] == [("all_gather", 64, own, 8)]
    # A window of 1024 columns reaches the third slice of 512 tokens, from both sides.
    windowed = dataclasses.replace(seven, windows=(1024,) * 32)
    (keys, _) = communication.forward_pass(windowed, mx.Strategy(RING), {"cp": 8}, **sizes)
    assert keys.count == 32 * 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", [RING, GATHER])
def test_the_closed_form_with_latents(layout):
    model = _on(f"{layout} batch@dp", "cp=4,dp=2", config=LATENT)
    form = communication.forward_pass(LATENT, model.strategy, model.mesh.shape, batch=2, seq=32, dtype="float32")
    assert _forward(model, 2, 32) == _counted(form)


@pytest.mark.parametrize(
    ("layout", "axes", "words"),
    [
        ("seq@tp hidden@tp", {"tp": 2}, ("'seq' and 'hidden'", "'tp'", "add up different tokens")),
        ("seq@tp batch@tp", {"tp": 2}, ("'seq' and 'batch'", "give one of them another axis")),
        (f"{mx.SEQUENCE_PARALLEL.layout} seq@tp", {"tp": 2}, ("'seq' and", "'tp'")),
        ("seq@a kv_seq@b", {"a": 2, "b": 2}, ("'seq' and 'kv_seq' over different axes", "ring", "gathers")),
        ("seq@a,b kv_seq@a", {"a": 2, "b": 2}, ("over different axes",)),
    ],
)
def test_what_cannot_be_split_together_is_refused(layout, axes, words):
    with refused(*words):
        mx.Strategy(layout).check(CONFIG, AbstractMesh(tuple(axes.values()), tuple(axes)))


def test_a_length_that_does_not_divide_is_refused():
    strategy, axes = mx.Strategy(f"{RING} batch@dp"), {"dp": 2, "cp": 4}
    model = dataclasses.replace(with_strategy(small_model(), strategy), mesh=with_auto_axes(make_mesh(axes)))
    words = "Rows of 12 tokens", "4 devices", "8 equal slices", "multiple of 8"
    ids = jnp.zeros((2, 12), jnp.int32)
    for call in (model, lambda ids: model.hidden(ids)[0]):
        with refused(*words):
            call(ids)
    with refused(*words):
        communication.forward_pass(SMALL, strategy, axes, batch=2, seq=12)
    rows = train.one_a_row([train.causal([1, 2])] * 2, 12)
    state = eqx.filter_eval_shape(lambda: train.TrainState.init(model, optax.sgd(1.0)))
    for call in (train.make_step(optax.sgd(1.0)), train.make_evaluation()):
        with refused(*words):
            call(state, rows)


# A long prompt.


@pytest.mark.parametrize("cache_dtype", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_devices_share_a_prompt_and_keep_their_keys(cache_dtype):
    """In two passes, with padding before the shorter prompt; tokens are those of one device."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 60, length).tolist() for length in (31, 20)]
    options = {"max_new_tokens": 9, "eos_id": (), "prefill_chunk": 4, "cache_dtype": cache_dtype}
    model = small_model()
    expected = mx.generate(model, prompts, **options).tokens
    split = on(model, mx.Strategy(RING), {"cp": 4})
    np.testing.assert_array_equal(mx.generate(split, prompts, **options).tokens, expected)


def test_a_prompt_is_sent_around_and_nothing_is_moved_afterwards():
    model = _on(f"{RING} vocab@tp", "cp=4,tp=2")
    form = communication.prefill(
        COMMUNICATION, model.strategy, model.mesh.shape, batch=2, seq=16, kv_seq=32, dtype="float32"
    )
    assert _prefill(model, 2, 16, 32) == _counted(form)
    # Keys, values and their mask indices, three times in each of the layers; and the last token.
    assert sum(one.count for one in form if one.kind == "collective_permute") == 3 * 3 * COMMUNICATION.layers
