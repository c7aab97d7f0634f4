"""The closed form of what a step of training exchanges, against the programs themselves."""

import collections
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from fixtures.generation import refused
from fixtures.model import SMALL, small_model
from fixtures.sharding import exchanges

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.parallel import with_auto_axes, with_strategy
from mistral_eqx.parallel.mesh import make_mesh
from mistral_eqx.planning import Training, training_step


# No two exchanges of one kind have one size by chance.
CONFIG = dataclasses.replace(
    SMALL, vocab=272, embed=24, hidden=80, kv_heads=4, q_per_kv=2, head_dim=16, windows=(None,) * 2, layers=2
)
BATCH, SEQ = 4, 8
OPTIMIZER = train.adamw(1e-3)

NAMED = {
    "batch": ("", {}),
    "heads": (mx.HEADS.layout, {"tp": 2}),
    "sequence_parallel": (mx.SEQUENCE_PARALLEL.layout, {"tp": 2}),
    "head_dim": (mx.HEAD_DIM.layout, {"tp": 2}),
    "kv_replicated": (mx.KV_REPLICATED.layout, {"kv": 2, "rep": 2}),
    "heads_x_head_dim": (mx.HEADS_X_HEAD_DIM.layout, {"kv": 2, "rep": 2}),
    "heads_x_kv_seq": (mx.HEADS_X_KV_SEQ.layout, {"kv": 2, "rep": 2}),
    "ring": ("kv_heads@tp hidden@tp vocab@tp seq@cp kv_seq@cp", {"cp": 2, "tp": 2}),
    "gather": (f"{mx.SEQUENCE_PARALLEL.layout} seq@cp", {"cp": 2, "tp": 2}),
}


def lowered_step(strategy, axes, training, *, config=CONFIG, batch=BATCH, dtype="float32"):
    """What the program exchanges; nothing is compiled or placed anywhere."""
    mesh = with_auto_axes(make_mesh(axes))
    strategy.check(config, mesh)
    model = dataclasses.replace(with_strategy(small_model(config=config), strategy), mesh=mesh)
    state = eqx.filter_eval_shape(lambda: train.TrainState.init(model, OPTIMIZER, zero=training.zero))
    shapes, static = eqx.partition(state, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    step = train.make_step(OPTIMIZER, compute_dtype=dtype, accumulate=training.accumulate, remat=training.remat)
    ids = jnp.zeros((batch, training.seq), jnp.int32)
    rows = train.Batch(ids, ids, jnp.ones(ids.shape), ids, ids, ids)
    lowered = jax.jit(lambda shapes, rows: eqx.filter(step(eqx.combine(shapes, static), rows), eqx.is_array)).lower(
        shapes, rows
    )
    return exchanges(lowered)


def form(strategy, axes, training, *, config=CONFIG, batch=BATCH, dtype="float32"):
    found = collections.Counter()
    for one in training_step(config, strategy, axes, batch=batch, training=training, dtype=dtype):
        found[one.kind, one.bytes, one.devices] += one.count
    return found


def assert_form(strategy, axes, training, **options):
    expected, found = form(strategy, axes, training, **options), lowered_step(strategy, axes, training, **options)
    assert found == expected


def check(name, training, axes=None, **options):
    layout, own = NAMED[name]
    assert_form(mx.Strategy(f"{layout} batch@dp".strip()), axes or {"dp": 2, **own}, training, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    # What the stage and what the strategy exchange are two sums: each strategy has two of the stages.
    ("name", "zero"),
    [(name, (number + more) % 4) for number, name in enumerate(NAMED) for more in (0, 2)],
)
def test_the_closed_form_under_every_strategy_and_stage(name, zero):
    check(name, Training(SEQ, zero))


TURNS = dataclasses.replace(CONFIG, tied=True, windows=(3, None, 3, None), layers=4)
# Nothing divides the norms: they stay whole.
ODD = dataclasses.replace(CONFIG, embed=27)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "training", "options"),
    [
        ("heads_x_kv_seq", Training(SEQ, 0), {"dtype": "bfloat16"}),
        ("head_dim", Training(SEQ, 3), {"dtype": "bfloat16"}),
        ("sequence_parallel", Training(SEQ, 2), {"dtype": "bfloat16"}),
        ("heads", Training(SEQ, 2, accumulate=2), {}),
        ("heads", Training(SEQ, 3, accumulate=2), {}),
        ("heads", Training(SEQ, 3), {"config": TURNS}),
        ("sequence_parallel", Training(SEQ, 1), {"config": TURNS}),
        ("heads", Training(SEQ, 3), {"config": ODD}),
        ("heads", Training(SEQ, 2, accumulate=2), {"config": ODD}),
        ("heads_x_kv_seq", Training(SEQ, 2, remat="dots"), {}),
        ("sequence_parallel", Training(SEQ, 3, remat="dots"), {}),
        ("heads_x_kv_seq", Training(SEQ, 2, remat="none"), {}),
        # A window skips the second of three hops; heads of queries share the keys that travel.
        ("ring", Training(16, 3, accumulate=2), {"config": TURNS, "axes": {"dp": 1, "cp": 4, "tp": 2}}),
        ("gather", Training(SEQ, 2, remat="dots"), {"config": TURNS, "dtype": "bfloat16"}),
        ("ring", Training(SEQ, 1, remat="none"), {}),
        # Attention in tiles, and lengths that are not dealt out evenly.
        ("heads_x_kv_seq", Training(2048), {}),
        ("sequence_parallel", Training(7), {}),
        ("heads_x_kv_seq", Training(7), {}),
    ],
)
def test_the_closed_form_of_other_steps(name, training, options):
    check(name, training, **options)


# 128 tokens on a device are the fewest that travel by all_to_all; fewer are gathered.
ROUTED = dataclasses.replace(CONFIG, routing=mx.Routing(experts=8, per_token=2, hidden=48))
FAR = 128


@pytest.mark.parametrize(
    ("layout", "axes", "training", "options"),
    [
        ("experts@ep hidden@tp batch@dp", {"dp": 2, "ep": 2, "tp": 2}, Training(SEQ, 3), {}),
        ("batch@dp experts@dp hidden@tp", {"dp": 4, "tp": 2}, Training(FAR, 1), {"batch": 4}),
        *(
            pytest.param(*case, marks=pytest.mark.long if number % 2 else pytest.mark.slow)
            for number, case in enumerate(
                (
                    ("experts@ep batch@dp", {"dp": 2, "ep": 4}, Training(SEQ, 2, accumulate=2), {"dtype": "bfloat16"}),
                    ("experts@ep kv_heads@tp hidden@tp", {"ep": 2, "tp": 2}, Training(SEQ, remat="none"), {}),
                    ("kv_heads@tp hidden@tp vocab@tp tokens@tp batch@dp", {"dp": 2, "tp": 2}, Training(SEQ, 1), {}),
                    ("experts@ep kv_heads@tp hidden@tp vocab@tp tokens@tp", {"ep": 2, "tp": 2}, Training(SEQ), {}),
                    ("batch@dp experts@dp hidden@tp", {"dp": 2, "tp": 2}, Training(SEQ, 2), {}),
                    ("batch@dp,ep experts@ep", {"dp": 2, "ep": 4}, Training(FAR, 3), {"batch": 8, "dtype": "bfloat16"}),
                    ("batch@dp experts@ep,dp", {"dp": 4, "ep": 2}, Training(FAR, remat="dots"), {}),
                    ("kv_heads@tp experts@tp vocab@tp tokens@tp batch@dp", {"dp": 2, "tp": 4}, Training(2 * FAR), {}),
                    ("kv_heads@tp experts@tp vocab@tp tokens@tp batch@dp", {"dp": 2, "tp": 4}, Training(SEQ, 3), {}),
                )
            )
        ),
    ],
)
def test_the_closed_form_with_experts(layout, axes, training, options):
    assert_form(mx.Strategy(layout), axes, training, config=ROUTED, **options)


@pytest.mark.slow
def test_the_closed_form_of_a_layer_pattern_with_experts():
    config = dataclasses.replace(ROUTED, windows=(3, None, 3, None), layers=4)
    assert_form(mx.Strategy("batch@dp experts@dp hidden@tp"), {"dp": 4, "tp": 2}, Training(FAR, 1), config=config)
    assert_form(mx.Strategy("experts@ep hidden@tp"), {"ep": 4, "tp": 2}, Training(SEQ), config=config)


def test_what_has_no_closed_form_is_refused():
    with refused("no closed form", "shared experts or dense first layers"):
        config = dataclasses.replace(ROUTED, routing=mx.Routing(experts=8, per_token=2, shared=1))
        training_step(config, mx.HEADS, {"tp": 2}, batch=2, training=Training(SEQ))
    with refused("no closed form", "'embed@tp batch@dp'"):
        training_step(CONFIG, mx.Strategy("embed@tp batch@dp"), {"dp": 2, "tp": 2}, batch=4, training=Training(SEQ))
    with refused("batch of 3", "2 micro-batches"):
        training_step(CONFIG, mx.SINGLE, {"dp": 2}, batch=3, training=Training(SEQ, accumulate=2))
