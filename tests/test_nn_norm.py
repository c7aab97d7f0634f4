import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import numpy_reference as reference
from fixtures.model import relative_error

from mistral_eqx.nn import RMSNorm


def _norm_and_x(dtype, scale=1.0):
    draw = np.random.default_rng(0).standard_normal
    return RMSNorm(jnp.asarray(1 + draw(24), dtype), 1e-5), jnp.asarray(scale * draw((2, 5, 24)), dtype)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2**-7), ("float16", 2**-10)])
def test_is_that_of_numpy(dtype, bound):
    norm, x = _norm_and_x(dtype)
    y = eqx.filter_jit(norm)(x)
    assert y.dtype == dtype
    for row, found in zip(x, y, strict=True):
        assert relative_error(found, reference.rms_norm(norm, np.asarray(row, np.float64))) < bound


def test_mean_is_taken_in_float32():
    # In float16 the squares would be infinite.
    norm, x = _norm_and_x(jnp.float16, scale=1000)
    assert np.isfinite(norm(x)).all()
    assert relative_error(norm(x), norm(x / 1000)) < 2**-9


def test_eps_is_added_to_the_mean_of_squares():
    norm = RMSNorm(jnp.ones(4), 0.25)
    np.testing.assert_allclose(norm(jnp.full((1, 1, 4), 0.5)), 0.5 / np.sqrt(0.5))
    np.testing.assert_array_equal(norm(jnp.zeros((1, 1, 4))), 0)
