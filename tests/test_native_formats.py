"""Products of the C++ kernels in the block formats that are not GGUF's, compared with the dequantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import product_bound, relative_error

import mistral_eqx as mx
from mistral_eqx.nn.kernels import native
from mistral_eqx.nn.linear import Linear, project
from mistral_eqx.quant import AbstractCalibratedScheme, BlockWeight, Inputs, Layer, block_format, to_panels


pytestmark = pytest.mark.skipif(native.instructions() is None, reason="The C++ kernels were not built.")

INPUTS = 768
# Those whose products take activations as they are, and those that round them to two codes.
FLOATS = ("NF4/32", "NF4/64", "NF4/768", "NF4D/768", "NF4D/384", "FP8/32", "FP8/128", "FP8", "INT8", "NVFP4")
CODES = ("MXFP4", "INT2/64", "INT3/32", "INT4/64", "INT4/128", "INT5/96", "INT6/256", "INT7/768", "INT8/64")
# Each kind of codes once.
ONE_OF_EACH = ("NF4/64", "NF4D/768", "FP8/32", "FP8", "INT8", "NVFP4", "MXFP4", "INT4/64", "INT8/64")


def random_blocks(name, rows, inputs=INPUTS):
    """Random bytes as blocks, with scales of ordinary size and no code of NaN."""
    format, draw = block_format(name), np.random.default_rng(0)
    raw = draw.integers(0, 256, (rows, inputs // format.size, format.nbytes), dtype=np.uint8)
    if name.startswith("NF4D"):
        # The offset and the factors.
        count = sum(format.fields[:2])
        raw[..., :count] = draw.uniform(0.01, 1, (*raw.shape[:2], count // 4)).astype(np.float32).view(np.uint8)
    elif format.fields[0] == 4:
        raw[..., :4] = draw.uniform(0.01, 1, (*raw.shape[:2], 1)).astype(np.float32).view(np.uint8)
    if name == "MXFP4":
        raw[..., 0] = draw.integers(120, 134, raw.shape[:2])
    if name.startswith(("FP8", "NVFP4")):
        codes = raw[..., 4:] if format.fields[0] == 4 else raw
        codes[codes & 0x7F == 0x7F] = 0
    return raw


def in_panels(name, raw):
    """A weight as the kernels read it."""
    return BlockWeight(jnp.asarray(to_panels(raw, block_format(name))), name, 1, panel=native.PANEL)


def numbers_of(name, raw):
    return np.asarray(block_format(name).dequantize(jnp.asarray(raw))).reshape(len(raw), -1)


def random_x(rows, inputs=INPUTS):
    return np.random.default_rng(rows).normal(size=(rows, inputs)).astype(np.float32)


def product(weight, x):
    return np.asarray(native.linear(jnp.asarray(x), [weight.blocks], [weight.format])[0])


@pytest.mark.parametrize("name", FLOATS + CODES)
def test_products_are_those_of_the_dequantized_weight(name):
    assert native.supports(name)
    raw = random_blocks(name, 48)
    weight, numbers = in_panels(name, raw), numbers_of(name, raw).astype(np.float64)
    # How rows are divided is the same for all formats (tests/test_quant_blocks.py); from 16 on there are tiles of them.
    for rows in (1, 8, 21):
        x = random_x(rows)
        assert (np.abs(product(weight, x) - x @ numbers.T) <= product_bound(x, numbers, name not in FLOATS)).all()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_row_gives_what_it_gives_alone(name):
    weight, x = in_panels(name, random_blocks(name, 32)), random_x(40)
    few, many = product(weight, x[:15]), product(weight, x)
    for row in (0, 3, 14):
        np.testing.assert_array_equal(product(weight, x[row : row + 1])[0], few[row])
    np.testing.assert_array_equal(product(weight, x[3:22]), many[3:22])


@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_is_not_finite_stays_so_in_its_row(name, rows):
    weight, x = in_panels(name, random_blocks(name, 16)), random_x(rows)
    x[1, 77] = np.nan
    found = product(weight, x)
    assert np.isnan(found[1]).all()
    assert np.isfinite(np.delete(found, 1, axis=0)).all()


@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize(("name", "at"), [("FP8", 0), ("FP8/32", 7), ("NVFP4", 0)])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_not_a_number_is_none_in_the_product(name, at, code, rows):
    raw = random_blocks(name, 16)
    raw[5, 1, at] = code
    assert np.isnan(numbers_of(name, raw)[5]).any()
    found = product(in_panels(name, raw), random_x(rows))
    assert np.isnan(found[:, 5]).all()
    assert np.isfinite(np.delete(found, 5, axis=1)).all()


@pytest.mark.parametrize("name", ["INT8", "FP8", "NVFP4"])
def test_inputs_that_32_does_not_divide(name):
    raw = random_blocks(name, 16, 48)
    for rows in (3, 16):
        x = random_x(rows, 48)
        assert relative_error(product(in_panels(name, raw), x), x @ numbers_of(name, raw).astype(np.float64).T) < 1e-6


NONE = ["NF4", "NF4/", "NF4/48", "NF4/-64", "NF4/64x", "NF4/99999999999", "NF4D/96", "INT4", "INT9/64"]


@pytest.mark.parametrize("name", [*NONE, "Q4_0/32", "/32", ""])
def test_names_that_no_format_has(name):
    assert not native.supports(name)


def test_shapes_that_do_not_fit_are_refused_by_the_library():
    x, raw = jnp.zeros((2, 128)), np.zeros((16, 2, 36), np.uint8)
    panels = in_panels("NF4/64", raw).blocks
    (y,) = native.linear(x, [panels], ["NF4/64"])
    assert y.shape == (2, 16)
    for bad, weight, name in ((x[:, :64], panels, "NF4/64"), (x, panels, "NF4/32"), (x, panels[..., :-1], "NF4/64")):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
            jax.block_until_ready(native.linear(bad, [weight], [name]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such format"):
        jax.block_until_ready(native.linear(x, [panels], ["NF4/48"]))


@pytest.mark.parametrize("name", ["NF4/64", "INT4/64"])
def test_gradients_are_those_of_the_dequantized_weight(name):
    raw = random_blocks(name, 32)
    weight, x = in_panels(name, raw), jnp.asarray(random_x(3))[None]
    found = jax.grad(lambda x: jnp.sum(weight.contract(x, "a", "b")))(x)
    # Sums of 32 numbers in float32.
    assert relative_error(found[0, 0], numbers_of(name, raw).astype(np.float64).sum(axis=0)) < 1e-6


# Each with the calls of a kernel that three layers of the same input need.
SCHEMES = {
    "NF4": (mx.NF4(), 1),
    "NF4, double": (mx.NF4(double=True), 1),
    "RTN": (mx.RTN(), 1),
    "RTN, 3 bits": (mx.RTN(bits=3, group_size=32), 1),
    "Int8": (mx.Int8(zero_point=True), 1),
    "Int8, columns": (mx.Int8(by="column"), 3),
    "Int8, blocks": (mx.Int8(by=32), 1),
    "LLM.int8()": (mx.Int8(activations="int8", threshold=2.0), 3),
    "FP8": (mx.FP8(), 1),
    "FP8, tensor": (mx.FP8(by="tensor"), 1),
    "FP8, blocks": (mx.FP8(by=32), 1),
    "MXFP4": (mx.GGUF("MXFP4"), 1),
    "GPTQ": (mx.GPTQ(group_size=32), 1),
    "GPTQ, sorted inputs": (mx.GPTQ(group_size=32, act_order=True), 3),
    "AWQ": (mx.AWQ(group_size=32), 1),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_of_schemes_have_kernels(name, monkeypatch):
    scheme, calls = SCHEMES[name]
    draw = np.random.default_rng(0)
    seen = draw.normal(size=(256, 64)).astype(np.float32)
    inputs = Inputs(2 * seen.T @ seen / 256, np.abs(seen).mean(axis=0))
    layers = []
    for outputs in (3, 1, 1):
        numbers, layer = draw.normal(size=(outputs, 16, 64)).astype(np.float32), Layer("layer", 2, panels=True)
        calibrated = isinstance(scheme, AbstractCalibratedScheme)
        weight = scheme.weight(numbers, layer, inputs) if calibrated else scheme.weight(numbers, layer)
        layers.append(Linear(weight, "embed", "kv_heads head_dim"))
    x = jnp.asarray(seen[None, :5])
    together = jax.jit(lambda x: project(x, layers))
    assert together.lower(x).as_text().count("stablehlo.custom_call @mistral_eqx_linear") == calls
    found = together(x)
    monkeypatch.setattr(native, "instructions", lambda: None)
    for one, layer in zip(found, layers, strict=True):
        # Activations within 1.6e-5, which add up to less than 4e-5 in a product.
        assert relative_error(one, layer(x)) < 4e-5
