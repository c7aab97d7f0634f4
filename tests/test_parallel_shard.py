import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import SMALL, relative_error, small_model
from jax.sharding import AxisType

import mistral_eqx as mx
from mistral_eqx.parallel import NAMED, gather_to_host, specs, with_auto_axes
from mistral_eqx.parallel.mesh import make_mesh


CONFIG = dataclasses.replace(SMALL, vocab=64, kv_heads=4, q_per_kv=2)
MESHES = {"tp": {"tp": 4}, "kv": {"kv": 2, "rep": 2}}


def _shapes(x):
    return {shard.data.shape for shard in x.addressable_shards}


def _arrays(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_array))


@pytest.mark.parametrize("name", [name for name in NAMED if name != "experts"])
def test_each_device_holds_its_part_and_the_weights_stay_as_they_are(name):
    model, strategy = small_model(config=CONFIG), NAMED[name]
    mesh = make_mesh(MESHES[strategy.axes("hidden")[0]])
    split = mx.shard(model, mesh, strategy)
    assert (split.strategy, split.mesh.shape) == (strategy, mesh.shape)
    assert all(block.attention.strategy == strategy for block in split.blocks)
    held = 0
    for before, after, spec in zip(
        _arrays(model), _arrays(split), jax.tree.leaves(specs(model, strategy)), strict=True
    ):
        np.testing.assert_array_equal(before, after)
        parts = math.prod(mesh.shape[axis] for entry in spec if entry for axis in np.atleast_1d(entry))
        (shape,) = _shapes(after)
        assert math.prod(shape) * parts == before.size
        assert len(after.addressable_shards) == 4
        held += math.prod(shape)
    # All but norms is split; keys and values are held twice where they are replicated.
    assert held < sum(leaf.size for leaf in _arrays(model)) / (2 if name in ("kv_replicated", "heads_x_kv_seq") else 3)
    # The model that was given is still on one device.
    assert model.mesh is None
    assert all(len(leaf.devices()) == 1 for leaf in _arrays(model))


@pytest.mark.slow
def test_a_split_model_can_be_split_another_way():
    model = small_model(config=CONFIG)
    ids = jnp.asarray([[3, 1, 4, 1]], jnp.int32)
    expected = model(ids)
    once = mx.shard(model, make_mesh("tp=4"), mx.HEADS)
    twice = mx.shard(once, make_mesh("kv=2,rep=2"), mx.HEADS_X_KV_SEQ)
    back = mx.shard(twice, make_mesh("tp=1"), mx.SINGLE)
    for split in (once, twice, back):
        assert relative_error(eqx.filter_jit(split)(ids), expected) < 2e-6
    assert [leaf.sharding for leaf in _arrays(twice)] != [leaf.sharding for leaf in _arrays(once)]


@pytest.mark.slow
def test_a_mesh_of_explicit_axes_works():
    """What `jax.make_mesh` gives unless told otherwise."""
    mesh = jax.make_mesh((2, 2), ("kv", "rep"), devices=jax.devices()[:4])
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert set(with_auto_axes(mesh).axis_types) == {AxisType.Auto}
    model, ids = small_model(config=CONFIG), jnp.asarray([[3, 1, 4]], jnp.int32)
    split = mx.shard(model, mesh, mx.KV_REPLICATED)
    assert relative_error(eqx.filter_jit(split)(ids), model(ids)) < 2e-6
    found = mx.generate(split, [[3, 1]], max_new_tokens=3)
    np.testing.assert_array_equal(found.tokens, mx.generate(model, [[3, 1]], max_new_tokens=3).tokens)


def test_logits_are_split_as_the_vocabulary_and_the_rows_are():
    model = mx.shard(small_model(config=CONFIG), make_mesh("dp=2,tp=2"), mx.HEADS + "batch@dp")
    logits = eqx.filter_jit(model)(jnp.zeros((4, 3), jnp.int32))
    assert logits.shape == (4, 3, 64)
    assert _shapes(logits) == {(2, 3, 32)}
    assert gather_to_host(logits).shape == (4, 3, 64)


# einshard

X = np.arange(2 * 4 * 6 * 8.0, dtype=np.float32).reshape(2, 4, 6, 8)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("expression", "shape"),
    [
        ("a b c d", (2, 4, 6, 8)),
        ("a@x b c d", (1, 4, 6, 8)),
        ("a b@y c d@x", (2, 1, 6, 4)),
        ("a b c d@x,y", (2, 4, 6, 1)),
        ("a b c d@y,x", (2, 4, 6, 1)),
        ("...", (2, 4, 6, 8)),
        ("... d@y", (2, 4, 6, 2)),
        ("... _@y", (2, 4, 6, 2)),
        ("a@x ...", (1, 4, 6, 8)),
        ("a@x ... d@y", (1, 4, 6, 2)),
        ("a b c@x d ...", (2, 4, 3, 8)),
        ("  kv_heads   b@y  c  head_dim ", (2, 1, 6, 8)),
    ],
)
def test_einshard_puts_a_part_on_each_device(expression, shape, kind):
    mesh = make_mesh("x=2,y=4")
    found = mx.einshard(kind(X), expression, mesh)
    assert _shapes(found) == {shape}
    assert len(found.addressable_shards) == 8
    # Each of them is the part that it says it is; those of axes that are not named are copies.
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, X[shard.index])
    parts = {str(shard.index) for shard in found.addressable_shards}
    assert len(parts) == X.size // math.prod(shape)


def test_einshard_takes_the_major_axis_first():
    mesh = make_mesh("x=2,y=4")
    first = {
        shard.device: shard.index[0].start or 0 for shard in mx.einshard(X[0, 0, 0], "d@x,y", mesh).addressable_shards
    }
    assert [first[device] for device in mesh.devices.flat] == list(range(8))
    first = {
        shard.device: shard.index[0].start or 0 for shard in mx.einshard(X[0, 0, 0], "d@y,x", mesh).addressable_shards
    }
    assert [first[device] for device in mesh.devices.T.flat] == list(range(8))


def test_trap_an_anonymous_mesh_per_array_cannot_meet_a_collective():
    mesh = make_mesh("x=2,y=4")
    first, second = mx.einshard(X[0, 0], "c@x d@y", mesh), mx.einshard(X[0, 1], "c d@y", mesh)
    assert first.sharding.mesh == second.sharding.mesh == mesh
    np.testing.assert_array_equal(jax.jit(lambda a, b: a @ b.T)(first, second), X[0, 0] @ X[0, 1].T)


def test_einshard_of_bits_and_scalars():
    mesh = make_mesh("x=2")
    assert mx.einshard(np.zeros((4, 2), np.uint8), "a@x b", mesh).dtype == jnp.uint8
    assert mx.einshard(jnp.zeros((4, 2), jnp.bfloat16), "a@x b", mesh).dtype == jnp.bfloat16
    assert mx.einshard(np.array(3.0, np.float32), "", mesh).shape == ()
    assert _shapes(mx.einshard(mx.einshard(X, "a@x ...", mesh), "... d@x", mesh)) == {(2, 4, 6, 4)}


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("a b c", "'a b c' does not name the 4 dimensions of the array, which has shape (2, 4, 6, 8)"),
        ("a b c d e", "does not name the 4 dimensions"),
        ("a b c d e ...", "does not name the 4 dimensions"),
        ("... a ...", "more than one '...'; keep one."),
        ("a@x a c d", "two dimensions 'a'; give each its own name."),
        ("a@z b c d", "splits 'a' over the mesh axis 'z', which the mesh lacks: it has 'x', 'y'."),
        ("a@x b@x c d", "uses the mesh axis 'x' for two dimensions."),
        ("a@y b c d", "2 a cannot be split over 4 devices; change the mesh or the array."),
        ("a b c@x,y d", "6 c cannot be split over 8 devices"),
        ("a@x@y b c d", "must be a dimension and its mesh axes, such as 'kv_heads@tp'"),
        ("a@ b c d", "must be a dimension and its mesh axes"),
        ("a@x,x b c d", "names one mesh axis twice; keep one."),
        ("a b c ...@x", "must be a dimension and its mesh axes"),
        ("_ _@x c d", "two dimensions '_'; give each its own name."),
    ],
)
def test_einshard_refuses_what_does_not_fit(expression, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (its words are looked at below)
        mx.einshard(X, expression, make_mesh("x=2,y=4"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")
