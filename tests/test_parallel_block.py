import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import SMALL, relative_error, small_model
from fixtures.sharding import mesh, sharded
from jax.sharding import PartitionSpec as P

from mistral_eqx.nn import Buffer, Context, FullCache
from mistral_eqx.parallel import SINGLE, Strategy, specs, with_strategy


CONFIG = dataclasses.replace(SMALL, layers=1, windows=(5,), kv_heads=4)
KV_SEQ = 9
HEADS, HEAD_DIM = "kv_heads@tp hidden@tp", "head_dim@tp hidden@tp"


def _apply(block, x, layer):
    """A block on seven tokens, six in one piece and the last one alone."""
    known, outputs = jnp.full((1, KV_SEQ), -1, jnp.int32), []
    for start, stop in ((0, 6), (6, 7)):
        context = Context.init(
            CONFIG.rope,
            jnp.arange(start, stop, dtype=jnp.int32)[None],
            strategy=block.attention.strategy,
            cached=(known, jnp.asarray(start, jnp.int32)),
        )
        y, layer = block(x[:, start:stop], context, layer)
        known = context.key_index
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), layer


@pytest.mark.parametrize(
    ("layout", "all_reduces", "devices", "dtype"),
    [
        pytest.param(layout, all_reduces, devices, dtype, id=f"{name}_{devices}_{dtype}")
        for name, layout, all_reduces in (("heads", HEADS, 2), ("head_dim", HEAD_DIM, 3))
        for devices, dtype in ((2, "float32"), (4, "float32"), (4, "bfloat16"))
    ],
)
def test_a_block_on_several_devices_is_the_one_on_one(layout, all_reduces, devices, dtype):
    """By heads a block adds up twice: after attention and after the feed-forward layer; by `head_dim` the scores too.

    The cache is split as the heads are, and the angles as `head_dim` is.
    """
    strategy = Strategy(layout)
    model = small_model(config=CONFIG, dtype=dtype)
    block = model.blocks[0]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, CONFIG.embed)), dtype)
    buffer = Buffer.init((1, CONFIG.kv_heads, KV_SEQ, CONFIG.head_dim), dtype)
    layer = FullCache(buffer, buffer)
    expected, expected_layer = eqx.filter_jit(_apply)(with_strategy(block, SINGLE), x, layer)

    split = strategy.spec("batch kv_heads kv_seq head_dim")
    layers = jax.tree.map(lambda buffer: split, layer)
    block = with_strategy(block, strategy)
    in_specs = (specs(block, strategy), P(), layers)
    (found, found_layer), collectives = sharded(_apply, mesh(devices), (block, x, layer), in_specs, (P(), layers))
    assert collectives == {"all_reduce": 2 * all_reduces}
    bound = 2e-6 if dtype == "float32" else 2**-6
    assert relative_error(found, expected) < bound
    assert relative_error(found_layer.k, expected_layer.k) < bound
    assert found_layer.k.addressable_shards[0].data.size == buffer.numbers.size // devices
    assert block.attention.scale == pytest.approx(CONFIG.head_dim**-0.5)
