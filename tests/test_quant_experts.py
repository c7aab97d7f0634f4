"""Quantized weights of experts: grouped products, whole models, and their split over devices."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.cases import every_third
from fixtures.checkpoint import TINY
from fixtures.latent import LATENT
from fixtures.model import product_bound, relative_error, run, small_model

import mistral_eqx as mx
from mistral_eqx.config import Routing
from mistral_eqx.nn import Context
from mistral_eqx.nn.kernels import contract_grouped, native
from mistral_eqx.quant import BlockWeight, Layer, blockwise, formats


ROUTED = dataclasses.replace(TINY, routing=Routing(experts=3, per_token=2))
SCHEMES = {
    "Q4_K": mx.GGUF("Q4_K"),
    "int8 rows": mx.Int8(zero_point=True),
    "int8 columns": mx.Int8(by="column", zero_point=True),
    "int8 blocks": mx.Int8(by=32),
    "nf4": mx.NF4(64),
    "fp8 tensor": mx.FP8(by="tensor"),
    "fp8 rows": mx.FP8(),
}


@pytest.mark.parametrize("panels", [True, False], ids=["panels", "rows"])
@pytest.mark.parametrize("name", every_third(SCHEMES))
def test_grouped_products_are_those_of_the_dequantized_weights(name, panels):
    """Without panels plain JAX multiplies; with them the kernel, where it is built."""
    draw, sizes = np.random.default_rng(0).standard_normal, jnp.array([0, 18, 0, 20])
    layer = Layer("experts", 2, panels=panels)
    weight = SCHEMES[name].weight(np.asarray(draw((4, 32, 256)), np.float32), layer)
    x, own = jnp.asarray(draw((40, 256)), jnp.float32), (jnp.arange(40) < 38)[:, None]

    def expected(x, sizes):
        return contract_grouped(weight.dense(), x, sizes)

    found, plain = (jnp.where(own, product(x, sizes), 0) for product in (weight.contract_grouped, expected))
    numbers = np.asarray(weight.dense(), np.float64)
    in_codes = panels and name not in ("nf4", "fp8 tensor", "fp8 rows")
    for group, rows in ((1, slice(0, 18)), (3, slice(18, 38))):
        assert (np.abs(found[rows] - plain[rows]) <= product_bound(x[rows], numbers[group], in_codes)).all()
    slope = jnp.where(own, jnp.asarray(draw((40, 32)), jnp.float32), 0)
    _, pull = jax.vjp(lambda x: weight.contract_grouped(x, sizes), x)
    _, pull_plain = jax.vjp(lambda x: expected(x, sizes), x)
    assert relative_error(pull(slope)[0], pull_plain(slope)[0]) < 1e-5


@pytest.mark.skipif(native.instructions() is None, reason="The C++ kernels were not built.")
def test_decoding_dequantizes_no_expert():
    config = dataclasses.replace(ROUTED, layers=1, windows=(None,))
    experts = mx.quantize(small_model(config=config), mx.GGUF("Q8_0")).blocks[0].feed_forward
    x = jnp.ones((1, 1, 32))
    text = eqx.filter_jit(lambda module, x: module(x)).lower(experts, x).compile().compiled.as_text()
    assert text.count('custom_call_target="mistral_eqx_grouped_linear"') == 3
    # All experts are operands of these calls, and of nothing else.
    assert not [line for line in text.splitlines() if "= u8[" in line and "parameter(" not in line]


@pytest.mark.parametrize(
    "scheme", [mx.GGUF("Q8_0"), *(pytest.param(one, marks=pytest.mark.slow) for one in (mx.NF4(32), mx.FP8("tensor")))]
)
def test_quantized_model_is_the_dequantized_one(scheme, without_kernels):
    model = small_model(config=ROUTED)
    small, ids = mx.quantize(model, scheme), np.arange(72, dtype=np.int32).reshape(1, 72) % 80
    assert isinstance(small.blocks[0].feed_forward.router.weight, type(model.blocks[0].feed_forward.router.weight))
    expected, _ = run(mx.dequantize(small), ids)
    # The error of float32.
    assert relative_error(run(small, ids)[0], expected) < 1e-5
    split = mx.shard(small, mx.make_mesh("ep=3,tp=2"), mx.Strategy("experts@ep hidden@tp"))
    assert relative_error(eqx.filter_jit(split)(ids), expected) < 1e-5


def test_quantized_when_loaded_is_quantized_after_loading(tmp_path):
    model = small_model(config=ROUTED)
    mx.save(model, tmp_path / "model")
    recipe = {"*.feed_forward.*": mx.NF4(32), "*.q_proj": mx.GGUF("Q8_0")}
    found, expected = mx.load(tmp_path / "model", quantize=recipe), mx.quantize(model, recipe)
    assert isinstance(found.blocks[0].feed_forward.down_proj.weight, BlockWeight)
    for one, other in zip(
        *(jax.tree.leaves(eqx.filter(each, eqx.is_array)) for each in (found, expected)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_other_layers_may_be_calibrated():
    model, ids = small_model(config=ROUTED), np.random.default_rng(0).integers(0, 80, (4, 32))
    recipe = {"*.feed_forward.*": mx.NF4(32), "*.q_proj": mx.GPTQ(group_size=32)}
    layer = mx.quantize(model, recipe, calibration=ids).blocks[1]
    assert (layer.feed_forward.up_proj.weight.format, layer.attention.q_proj.weight.format) == ("NF4/32", "INT4/32")


def errors_of_experts(numbers, weight, inputs):
    """Twice the mean squared error of the outputs of each expert on its own tokens."""
    change = np.asarray(weight.dense(), np.float64) - np.asarray(numbers, np.float64)
    return np.einsum("eoi,eij,eoj->e", change, inputs.hessian.astype(np.float64), change)


@pytest.mark.slow
def test_each_expert_is_calibrated_by_its_own_tokens(monkeypatch):
    """Statistics are those of the tokens that chose an expert, and errors are below those of rounding."""
    model, ids = small_model(config=ROUTED), np.random.default_rng(0).integers(0, 80, (6, 40)).astype(np.int32)
    seen, observed = [], blockwise._observed
    monkeypatch.setattr(blockwise, "_observed", lambda *args: seen.append(observed(*args)) or seen[-1])
    scheme = mx.GPTQ(bits=3, group_size=16)
    small = mx.quantize(model, {"blocks.0.feed_forward.*": scheme}, calibration=ids)
    layers, found = model.blocks[0].feed_forward, small.blocks[0].feed_forward
    assert isinstance(small.blocks[1].feed_forward.up_proj.weight, type(layers.up_proj.weight))
    by_layer = {path: inputs for shared, inputs in seen[0].items() for path in shared.layers}
    nearest = mx.quantize(model, {"blocks.0.feed_forward.*": mx.RTN(3, 16)}).blocks[0].feed_forward
    for name in ("gate_proj", "up_proj", "down_proj"):
        numbers, own = (getattr(each, name).weight for each in (layers, found))
        assert own.format == "INT3/16"
        inputs = by_layer[f"feed_forward.{name}"]
        plain = errors_of_experts(numbers.value, getattr(nearest, name).weight, inputs)
        assert (errors_of_experts(numbers.value, own, inputs) < 0.9 * plain).all(), name
    # The tokens of each expert, chosen one by one.
    context = Context.init(ROUTED.rope, jnp.arange(40, dtype=jnp.int32)[None], dtype=jnp.float32)

    @eqx.filter_jit
    def chosen(model, row):
        block, x = model.blocks[0], model.embedding(row)
        x = block.feed_forward_norm(x + block.attention(block.attention_norm(x), context)[0])
        return x[0], block.feed_forward.router(x)[0][0]

    normed, experts = (
        np.concatenate(each) for each in zip(*(chosen(model, jnp.asarray(row[None])) for row in ids), strict=True)
    )
    for expert in range(3):
        own = normed[np.any(experts == expert, axis=-1)].astype(np.float64)
        expected = 2 * own.T @ own / len(own)
        # Sums of some hundred products in float32.
        assert relative_error(by_layer["feed_forward.up_proj"].hessian[expert], expected) < 1e-5


def test_experts_that_saw_few_tokens_are_rounded_to_the_nearest():
    model = small_model(config=dataclasses.replace(ROUTED, layers=1, windows=(None,)))
    ids, recipe = np.random.default_rng(0).integers(0, 80, (4, 24)), {"*.down_proj": mx.GPTQ(4, 16)}
    with pytest.warns(UserWarning, match=r"experts of blocks\.0\.feed_forward\.down_proj saw fewer tokens"):
        found = mx.quantize(model, recipe, calibration=ids).blocks[0].feed_forward.down_proj.weight
    plain = mx.quantize(model, {"*.down_proj": mx.RTN(4, 16)}).blocks[0].feed_forward.down_proj.weight
    errors = [relative_error(one, other) for one, other in zip(found.dense(), plain.dense(), strict=True)]
    # Scales are rounded once or twice. The third expert saw enough tokens.
    assert max(errors[:2]) < 1e-6 < 1e-2 < errors[2]


@pytest.mark.long
def test_latent_attention_and_shared_experts_are_calibrated():
    latent = mx.Latent(q_rank=32, kv_rank=32, nope_dim=16, rope_dim=16, value_dim=32)
    routing = dataclasses.replace(LATENT.routing, experts=4, groups=2, groups_per_token=1, per_token=2, hidden=32)
    changed = {"embed": 32, "hidden": 32, "head_dim": 32, "latent": latent, "routing": routing}
    model = small_model(config=dataclasses.replace(LATENT, **changed))
    ids = np.random.default_rng(0).integers(0, 64, (8, 32))
    small = mx.quantize(model, mx.GPTQ(4, 16), calibration=ids)
    assert formats(small) == ["INT4/16"]
    dense = mx.dequantize(small)
    assert relative_error(run(small, ids[:2].astype(np.int32))[0], run(dense, ids[:2].astype(np.int32))[0]) < 1e-4


def test_what_experts_cannot_have_is_refused():
    model, ids = small_model(config=ROUTED), np.random.default_rng(0).integers(0, 80, (4, 32))
    with pytest.raises(mx.InputError, match=r"is of experts, whose inputs AWQ.* cannot scale; give it another scheme"):
        mx.quantize(model, mx.AWQ(group_size=32), calibration=ids)
    with pytest.raises(mx.InputError, match=r"is of experts, whose inputs cannot be sorted for each of them"):
        mx.quantize(model, {"*.up_proj": mx.GPTQ(4, 16, act_order=True)}, calibration=ids)
    latent = small_model(config=LATENT)
    with pytest.raises(mx.InputError, match=r"is beside latent attention, whose inputs AWQ.* cannot scale"):
        mx.quantize(latent, {"*.o_proj": mx.AWQ(group_size=8)}, calibration=ids)
