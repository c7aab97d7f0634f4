import equinox as eqx
import jax.numpy as jnp
import numpy as np
from fixtures import numpy_reference as reference
from fixtures.model import SMALL, relative_error, small_model

from mistral_eqx.nn import Context


POSITIONS = np.arange(6)


@eqx.filter_jit
def _apply(block, x):
    return block(x[None], Context.init(SMALL.rope, jnp.asarray(POSITIONS, jnp.int32)[None]))


def test_trap_post_norm_in_place_of_pre_norm():
    model = small_model()
    block, x = model.blocks[0], np.random.default_rng(0).standard_normal((len(POSITIONS), SMALL.embed))
    found, cache = _apply(block, jnp.asarray(x, jnp.float32))
    assert cache is None
    assert relative_error(found[0], reference.block(block, x, POSITIONS, theta=SMALL.rope_theta)) < 2e-6

    mixed = x + reference.attention(block.attention, x, POSITIONS, theta=SMALL.rope_theta)
    mixed = reference.rms_norm(block.attention_norm, mixed)
    after = reference.rms_norm(block.feed_forward_norm, mixed + reference.feed_forward(block.feed_forward, mixed))
    assert relative_error(found[0], after) > 0.1


def test_the_residual_stream_is_not_normalised():
    # What a layer adds does not grow with the stream, which goes through as it is.
    model = small_model()
    x = np.random.default_rng(0).standard_normal((len(POSITIONS), SMALL.embed))
    found, _ = _apply(model.blocks[0], jnp.asarray(1000 * x, jnp.float32))
    assert 1e-4 < relative_error(found[0], 1000 * x) < 0.02
