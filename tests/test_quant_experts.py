"""Quantized weights of experts: grouped products, whole models, and their split over devices."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.cases import every_third
from fixtures.checkpoint import TINY
from fixtures.model import relative_error, run, small_model

import mistral_eqx as mx
from mistral_eqx.config import Routing
from mistral_eqx.nn.kernels import contract_grouped, native
from mistral_eqx.quant import BlockWeight, Layer


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

    def loss(product, x):
        return jnp.sum(jnp.sin(jnp.where(own, product(x, sizes), 0) / 16))

    def expected(x, sizes):
        return contract_grouped(weight.dense(), x, sizes)

    found, plain = (jnp.where(own, product(x, sizes), 0) for product in (weight.contract_grouped, expected))
    # Sums of 256 products in float32; with 16 rows or more nothing is rounded.
    assert relative_error(found, plain) < 2e-6
    gradients = [jax.grad(loss, argnums=1)(product, x) for product in (weight.contract_grouped, expected)]
    assert relative_error(*gradients) < 1e-5


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
def test_quantized_model_is_the_dequantized_one(scheme):
    model = small_model(config=ROUTED)
    small, ids = mx.quantize(model, scheme), np.arange(72, dtype=np.int32).reshape(1, 72) % 80
    assert isinstance(small.blocks[0].feed_forward.router.weight, type(model.blocks[0].feed_forward.router.weight))
    expected, _ = run(mx.dequantize(small), ids)
    # The error of float32. An expert with fewer than 16 rows rounds activations to 16 bits.
    assert relative_error(run(small, ids)[0], expected) < 1e-4
    split = mx.shard(small, mx.make_mesh("ep=3,tp=2"), mx.Strategy("experts@ep hidden@tp"))
    assert relative_error(eqx.filter_jit(split)(ids), expected) < 1e-4


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
    with pytest.raises(mx.InputError, match=r"has experts, whose weights GPTQ.* does not quantize"):
        mx.quantize(model, mx.GPTQ(group_size=32), calibration=ids)
