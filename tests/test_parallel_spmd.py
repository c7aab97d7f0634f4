import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import SMALL, small_model
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mistral_eqx.nn import Cache, Mistral
from mistral_eqx.parallel import SINGLE, AbstractNamed, Strategy, entered, psum, specs, spmd
from mistral_eqx.parallel.mesh import make_mesh


ALL = Strategy("kv_heads@kv q_per_kv@rep head_dim@d hidden@h vocab@v embed@e batch@dp kv_seq@s")


class Part(eqx.Module):
    table: Float[Array, "vocab embed"]
    either: Float[Array, "batch seq"] | Int[Array, "batch seq"]
    maybe: Float[Array, " hidden"] | None
    parts: tuple["Part", ...] = ()
    name: str = "part"


class Named(AbstractNamed):
    arrays: dict

    def array_dims(self):
        return {"arrays.first": "hidden embed", "arrays.second": "vocab"}


def test_specs_follow_from_annotations():
    inner = Part(jnp.ones((2, 2)), jnp.ones((2, 2), jnp.int32), jnp.ones(2))
    outer = Part(jnp.ones((2, 2)), jnp.ones((2, 2)), None, (inner,))
    found = specs(outer, ALL)
    assert (found.table, found.either, found.maybe) == (P("v", "e"), P("dp", None), None)
    assert (found.parts[0].either, found.parts[0].maybe) == (P("dp", None), P("h"))
    assert found.name is None


def test_specs_follow_from_what_a_module_says():
    named = Named({"first": jnp.ones((2, 2)), "second": jnp.ones(2)})
    assert specs(named, ALL).arrays == {"first": P("h", "e"), "second": P("v")}
    # Also where it is one of several.
    assert specs([None, {"it": named}], ALL)[1]["it"].arrays["second"] == P("v")


def test_specs_of_a_model_and_of_its_cache():
    model = small_model()
    found = specs(model, ALL)
    attention = found.blocks[1].attention
    assert attention.q_proj.weight.value == P("kv", "rep", "d", "e")
    assert attention.v_proj.weight.value == P("kv", "d", "e")
    assert attention.o_proj.weight.value == P("e", "kv", "rep", "d")
    assert found.blocks[0].feed_forward.down_proj.weight.value == P("e", "h")
    assert found.blocks[0].attention_norm.weight == P("e")
    assert found.embedding.weight.value == found.head.weight.value == P("v", "e")
    cache = specs(Cache.init(SMALL, 2, 8), ALL)
    assert cache.layers[0].k_buffer.numbers == P("dp", "kv", "s", "d")
    assert (cache.positions, cache.used) == (P("dp", "s"), P())
    # Shapes do as well as arrays, so a plan needs no weights.
    shapes = eqx.filter_eval_shape(Mistral.init, SMALL, key=jax.random.key(0))
    assert jax.tree.leaves(specs(shapes, ALL)) == jax.tree.leaves(found)


def test_an_array_without_names_is_refused():
    with pytest.raises(ValueError, match=r"The dimensions of .* are unknown; annotate the field with jaxtyping"):
        specs([jnp.ones(2)], SINGLE)


def test_without_a_mesh_a_function_is_itself():
    def function(x):
        return x

    assert spmd(function, None, (P(),), P()) is function
    assert spmd(function, make_mesh("tp=2"), (P(),), P()) is not function
    assert not entered()


def test_the_mesh_is_entered_once():
    """A function that enters by itself may be called by another that has entered: shapes are local in both."""
    grid, strategy, shapes = make_mesh("tp=4"), Strategy("hidden@tp"), []

    def inner(x):
        shapes.append(x.shape)
        return psum(jnp.sum(x), "hidden", strategy)

    def outer(x):
        assert entered()
        assert spmd(inner, grid, (P("tp"),), P()) is inner
        return spmd(inner, grid, (P("tp"),), P())(x) + inner(x)

    x = jnp.arange(8.0)
    assert float(jax.jit(spmd(outer, grid, (P("tp"),), P()))(x)) == 2 * float(x.sum())
    assert shapes == [(2,), (2,)]


def test_what_is_no_array_goes_along():
    module = Part(jnp.arange(12.0).reshape(4, 3), jnp.ones((1, 1)), None, name="scaled")

    def function(module, factor, none):
        assert (module.name, factor, none) == ("scaled", 3, None)
        return module.table * factor

    call = spmd(function, make_mesh("tp=2"), (specs(module, Strategy("vocab@tp")), None, None), P("tp", None))
    found = eqx.filter_jit(call)(module, 3, None)
    np.testing.assert_array_equal(found, 3 * module.table)
    assert found.addressable_shards[0].data.shape == (2, 3)
