"""The closed form of what a step of training exchanges, against the programs themselves."""

import collections
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from model_fixtures import SMALL, small_model
from sharding_fixtures import exchanges

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.parallel import by_hand, with_strategy
from mistral_eqx.parallel.mesh import make_mesh
from mistral_eqx.plan import Training, training_step


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
}


def lowered_step(strategy, axes, training, *, config=CONFIG, batch=BATCH, dtype="float32"):
    """What the program exchanges; nothing is compiled or placed anywhere."""
    mesh = by_hand(make_mesh(axes))
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


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("name", NAMED)
def test_the_closed_form_is_what_a_step_exchanges(name, zero):
    layout, axes = NAMED[name]
    strategy = mx.Strategy(f"{layout} batch@dp".strip())
    assert_form(strategy, {"dp": 2, **axes}, Training(SEQ, zero))
