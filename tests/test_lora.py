"""Adapters beside weights of any kind, on any strategy, and merged into them."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.lora import CONFIG, LINEAR, Int8Weight, adapted, adapters, quantized
from fixtures.model import FLOAT32_TOLERANCE, relative_error, small_model
from fixtures.sharding import exchanges

import mistral_eqx as mx
from mistral_eqx.lora import LoRAWeight, TrainedWeight
from mistral_eqx.nn import DenseWeight


IDS = np.random.default_rng(0).integers(0, CONFIG.vocab, (2, 9)).astype(np.int32)
ALL = (*LINEAR, "embedding", "head")
run = eqx.filter_jit(lambda model, ids: model(ids))


def untied():
    return small_model(config=dataclasses.replace(CONFIG, tied=False))


def logits(model):
    return np.asarray(run(model, jnp.asarray(IDS)))


@pytest.fixture(scope="module")
def expected():
    return logits(adapted(untied(), targets=ALL))


def _weight(base=None, *, inputs=(2, 3), outputs=(4, 5), rank=3, **options):
    draw = np.random.default_rng(0).standard_normal
    value = [
        jnp.asarray(draw(shape), jnp.float32) for shape in ((*outputs, *inputs), (rank, *inputs), (*outputs, rank))
    ]
    dense, a, b = map(DenseWeight, value)
    return LoRAWeight(dense if base is None else base(dense), a, b, 6.0, **options)


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 6 / 3), (True, 6 / 3**0.5)])
@pytest.mark.parametrize("base", [None, Int8Weight.of], ids=["dense", "int8"])
def test_a_weight_is_the_sum(base, use_rslora, scale):
    weight = _weight(base, use_rslora=use_rslora)
    whole = np.asarray(weight.base.dense(), np.float64) + scale * np.einsum(
        "hdr,rij->hdij", *(np.asarray(part.value, np.float64) for part in (weight.b, weight.a))
    )
    assert relative_error(weight.dense(), whole) < 1e-6
    x = np.random.default_rng(1).standard_normal((2, 3, 2, 3)).astype(np.float32)
    found = weight.contract(jnp.asarray(x), "kv_heads head_dim", "kv_heads q_per_kv")
    assert relative_error(found, np.einsum("hdij,bsij->bshd", whole, x)) < 1e-6


def test_a_table_is_the_sum():
    weight = _weight(inputs=(5,), outputs=(7,))
    ids = jnp.asarray([[6, 0, 2]])
    assert relative_error(weight.rows(ids), np.asarray(weight.dense())[np.asarray(ids)]) < 1e-6
    assert weight.row_count == 7


def test_adapters_are_as_precise_as_they_are_beside_a_bfloat16_weight():
    weight = _weight(lambda dense: DenseWeight(dense.value.astype(jnp.bfloat16)))
    x = jnp.ones((1, 2, 2, 3), jnp.bfloat16)
    found = weight.contract(x, "kv_heads head_dim", "kv_heads q_per_kv")
    assert found.dtype == jnp.float32
    base = np.asarray(weight.base.dense(), np.float64).sum((-2, -1))
    change = np.asarray(weight.b.value, np.float64) @ np.asarray(weight.a.value, np.float64).sum((-2, -1))
    assert relative_error(found[0, 0], base + 2 * change) < 1e-6
    assert weight.dense().dtype == jnp.bfloat16


@pytest.mark.slow
def test_a_model_says_the_same_at_first():
    model = untied()
    wrapped = mx.apply_lora(model, rank=2, alpha=4.0, targets=ALL, key=jr.key(0))
    assert (logits(wrapped) == logits(model)).all()
    assert len(adapters(wrapped)) == 2 * (4 * 7 + 2)
    for a, b in zip(adapters(wrapped)[::2], adapters(wrapped)[1::2], strict=True):
        # Uniform within one over the root of the number of inputs: its standard deviation is that over the root of 3.
        bound = np.prod(a.shape[1:]) ** -0.5
        assert np.abs(a).max() <= bound
        assert abs(np.std(a) / (bound / 3**0.5) - 1) < 0.3
        assert a.dtype == b.dtype == jnp.float32
        assert not b.any()


def test_default_targets_and_dtype():
    model = mx.apply_lora(small_model(config=CONFIG, dtype=jnp.bfloat16), rank=2, alpha=4.0, key=jr.key(0))
    block = model.blocks[1]
    wrapped = [name for name in LINEAR[:4] if isinstance(getattr(block.attention, name).weight, LoRAWeight)]
    assert wrapped == ["q_proj", "v_proj"]
    assert {leaf.dtype for leaf in adapters(model)} == {jnp.dtype(jnp.float32)}
    assert logits(model).dtype == np.float32
    light = mx.apply_lora(model, rank=2, alpha=4.0, dtype=jnp.bfloat16, targets=("o_proj",), key=jr.key(0))
    assert light.blocks[0].attention.o_proj.weight.a.value.dtype == jnp.bfloat16


STRATEGIES = {
    "HEADS": ({"tp": 2}, mx.HEADS),
    "SEQUENCE_PARALLEL": ({"dp": 2, "tp": 2}, mx.SEQUENCE_PARALLEL + "batch@dp"),
    "HEADS_X_HEAD_DIM": ({"kv": 2, "rep": 2}, mx.HEADS_X_HEAD_DIM),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "HEADS" else pytest.mark.slow) for name in STRATEGIES]
)
def test_on_a_mesh(name, expected):
    axes, strategy = STRATEGIES[name]
    before = mx.shard(adapted(untied(), targets=ALL), mx.make_mesh(axes), strategy)
    assert relative_error(logits(before), expected) < FLOAT32_TOLERANCE
    merged = mx.merge_lora(before)
    assert relative_error(logits(merged), expected) < FLOAT32_TOLERANCE
    plain = mx.shard(untied(), mx.make_mesh(axes), strategy)
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(plain), strict=True):
        assert not eqx.is_array(one) or one.sharding == other.sharding


def test_adapters_are_the_same_before_and_after_a_model_is_split():
    model, mesh = untied(), mx.make_mesh({"tp": 2})
    before = mx.shard(adapted(model, targets=ALL), mesh, mx.HEADS)
    after = mx.apply_lora(mx.shard(model, mesh, mx.HEADS), rank=3, alpha=5.0, targets=ALL, key=jr.key(1))
    for one, other in zip(adapters(before), adapters(after), strict=True):
        assert one.sharding == other.sharding
    for one, other in zip(adapters(before)[::2], adapters(after)[::2], strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()


def test_a_forward_pass_exchanges_no_more():
    mesh = mx.make_mesh({"tp": 2})
    model = mx.shard(untied(), mesh, mx.HEADS)
    plain, wrapped = (
        exchanges(run.lower(one, jnp.asarray(IDS)))
        for one in (model, mx.apply_lora(model, rank=3, alpha=5.0, targets=LINEAR, key=jr.key(1)))
    )
    assert plain == wrapped
    assert sum(plain.values()) == 1 + 2 * CONFIG.layers


def test_merged_is_the_same_model(expected):
    model = adapted(untied(), targets=ALL)
    merged = mx.merge_lora(model)
    assert jax.tree.structure(merged) == jax.tree.structure(untied())
    assert relative_error(logits(merged), expected) < FLOAT32_TOLERANCE
    assert relative_error(logits(untied()), expected) > 0.1


@pytest.mark.slow
def test_beside_weights_that_only_dequantise():
    model = quantized(untied())
    wrapped = adapted(model, targets=LINEAR)
    merged = mx.merge_lora(wrapped)
    assert relative_error(logits(merged), logits(wrapped)) < FLOAT32_TOLERANCE
    assert relative_error(logits(model), logits(wrapped)) > 0.1
    assert {type(block.feed_forward.up_proj.weight) for block in merged.blocks} == {DenseWeight}
    some = mx.merge_lora(adapted(model, targets=("q_proj",)))
    assert type(some.blocks[0].attention.q_proj.weight) is DenseWeight
    assert type(some.blocks[0].attention.v_proj.weight) is Int8Weight


def test_two_adapters_of_a_layer_add_up():
    once = adapted(untied(), targets=("q_proj",))
    twice = adapted(once, targets=("q_proj", "v_proj"), rank=2)
    assert relative_error(logits(mx.merge_lora(twice)), logits(twice)) < FLOAT32_TOLERANCE


def test_a_table_that_is_trained_as_a_whole():
    model = small_model(config=CONFIG, dtype=jnp.bfloat16)
    wrapped = mx.apply_lora(model, rank=2, alpha=4.0, train_embeddings=True, key=jr.key(0))
    assert isinstance(wrapped.embedding.weight, TrainedWeight)
    assert wrapped.embedding.weight.value.dtype == jnp.float32
    assert (logits(wrapped) == logits(model)).all()
    assert mx.merge_lora(wrapped).embedding.weight.value.dtype == jnp.bfloat16


@pytest.mark.slow
def test_adapters_generate():
    model = adapted(small_model(config=CONFIG))
    found = mx.generate(model, [[1, 2, 3], [4]], max_new_tokens=5)
    assert (found.tokens == mx.generate(mx.merge_lora(model), [[1, 2, 3], [4]], max_new_tokens=5).tokens).all()


def test_what_is_refused(tmp_path):
    model = small_model(config=dataclasses.replace(CONFIG, tied=True))
    options = {"rank": 2, "alpha": 4.0, "key": jr.key(0)}
    with refused("'wq'", "q_proj, k_proj", "down_proj"):
        mx.apply_lora(model, targets=("v_proj", "wq"), **options)
    with refused("'head'", "embedding"):
        mx.apply_lora(model, targets=("head",), **options)
    with refused("targets is empty"):
        mx.apply_lora(model, targets=(), **options)
    with refused("rank is 0"):
        mx.apply_lora(model, **{**options, "rank": 0})
    with refused("embedding", "train_embeddings"):
        mx.apply_lora(model, targets=("embedding",), train_embeddings=True, **options)
    with refused("merge its adapters"):
        mx.save(mx.apply_lora(model, **options), tmp_path / "model")
