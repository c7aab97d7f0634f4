import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import numpy_reference as reference
from fixtures.model import relative_error, small_model


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2**-6)])
def test_is_that_of_numpy(dtype, bound):
    module = small_model(dtype=dtype).blocks[0].feed_forward
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 24)), dtype)
    y = eqx.filter_jit(module)(x)
    assert y.dtype == dtype
    expected = np.stack([reference.feed_forward(module, np.asarray(row, np.float64)) for row in x])
    assert relative_error(y, expected) < bound


def test_gate_and_up_exchanged_would_be_seen():
    module = small_model().blocks[0].feed_forward
    x = np.random.default_rng(1).standard_normal((3, 24))
    exchanged = type(module)(module.up_proj, module.gate_proj, module.down_proj)
    assert relative_error(module(jnp.asarray(x, jnp.float32)[None])[0], reference.feed_forward(exchanged, x)) > 0.1
