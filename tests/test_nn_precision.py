import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from mistral_eqx.nn.precision import at_least_float32, from_bits, to_bits


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.uint16, (3, 4)), st.sampled_from(["bfloat16", "float16"]))
def test_bits_come_back(bits, dtype):
    floats = from_bits(jnp.asarray(bits), jnp.dtype(dtype))
    assert floats.dtype == dtype
    np.testing.assert_array_equal(to_bits(floats), bits)


def test_floats_stay():
    x = jnp.ones(3, jnp.bfloat16)
    assert from_bits(x, jnp.dtype(jnp.bfloat16)) is x


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_precision_of_sums(dtype, wide):
    assert at_least_float32(jnp.dtype(dtype)) == wide
