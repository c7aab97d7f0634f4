import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, strategies as st
from jax.sharding import PartitionSpec as P
from model_fixtures import small_model

from mistral_eqx.parallel import SINGLE, Strategy, with_strategy


def test_single_splits_nothing():
    assert Strategy() == SINGLE
    assert SINGLE.spec("kv_heads head_dim embed") == P(None, None, None)
    assert SINGLE.split_over("kv_heads head_dim embed") == ()


def test_spec_has_one_entry_a_dimension():
    strategy = Strategy("kv_heads@kv q_per_kv@rep hidden@kv,rep")
    assert strategy.spec("kv_heads q_per_kv head_dim embed") == P("kv", "rep", None, None)
    assert strategy.spec("hidden embed") == P(("kv", "rep"), None)
    assert strategy.spec("embed") == P(None)
    assert strategy.spec("") == P()


def test_split_over_names_the_axes_in_order():
    strategy = Strategy("kv_heads@kv q_per_kv@rep hidden@kv,rep")
    assert strategy.split_over("kv_heads q_per_kv head_dim") == ("kv", "rep")
    assert strategy.split_over("q_per_kv kv_heads") == ("rep", "kv")
    assert strategy.split_over("hidden") == ("kv", "rep")
    assert strategy.split_over("embed vocab") == ()


def test_white_space_and_order_are_free():
    first, second = Strategy("  hidden@tp   vocab@tp "), Strategy("vocab@tp hidden@tp")
    for dims in ("hidden embed", "vocab embed", "embed hidden"):
        assert first.spec(dims) == second.spec(dims)


@pytest.mark.parametrize(
    "entry", ["hidden", "hidden@", "@tp", "hidden@tp,", "hidden@,tp", "Hidden@tp", "hidden=tp", "a@b@c"]
)
def test_an_entry_of_another_form_is_refused(entry):
    with pytest.raises(ValueError, match="must be a dimension and its mesh axes, such as 'kv_heads@tp'") as error:
        Strategy(f"vocab@tp {entry}")
    assert repr(entry) in str(error.value)


def test_a_dimension_or_an_axis_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="names the dimension 'hidden' twice; keep one entry"):
        Strategy("hidden@tp hidden@dp")
    with pytest.raises(ValueError, match="'hidden@tp,tp' of a strategy names one mesh axis twice; keep one"):
        Strategy("hidden@tp,tp")


_names = st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True)
_layouts = st.dictionaries(_names, st.lists(_names, min_size=1, max_size=3, unique=True), max_size=4)


@given(_layouts, st.lists(_names, max_size=4))
def test_what_is_written_is_what_is_read(layout, others):
    strategy = Strategy(" ".join(f"{dim}@{','.join(axes)}" for dim, axes in layout.items()))
    dims = [*layout, *(name for name in others if name not in layout)]
    spec = strategy.spec(" ".join(dims))
    assert len(spec) == len(dims)
    for dim, entry in zip(dims, spec, strict=True):
        found = () if entry is None else (entry,) if isinstance(entry, str) else entry
        assert found == tuple(layout.get(dim, ()))
    assert strategy.split_over(" ".join(dims)) == tuple(axis for axes in layout.values() for axis in axes)


def test_equal_layouts_are_one_key():
    first, second = Strategy("hidden@tp"), Strategy("hidden@tp")
    # What was computed from one of them makes no difference.
    first.spec("hidden")
    assert first == second
    assert hash(first) == hash(second)
    assert {first: 1}[second] == 1
    assert first != Strategy("hidden@dp")
    with pytest.raises(AttributeError):
        first.layout = "vocab@tp"


def test_is_a_static_leaf_under_filter_jit():
    traces = []

    @eqx.filter_jit
    def apply(linear, x):
        traces.append(linear.strategy)
        return linear(x)

    linear = small_model().blocks[0].feed_forward.up_proj
    x = jnp.ones((1, 1, 24))
    assert [leaf for leaf in jax.tree.leaves(linear) if not eqx.is_array(leaf)] == [SINGLE]
    apply(linear, x)
    # An equal one, made anew, is the same program; another one is another.
    apply(with_strategy(linear, Strategy("")), x)
    assert traces == [SINGLE]
    apply(with_strategy(linear, Strategy("vocab@tp")), x)
    assert traces == [SINGLE, Strategy("vocab@tp")]


def test_one_tree_map_swaps_it_everywhere():
    model, split = small_model(), Strategy("kv_heads@tp hidden@tp vocab@tp")
    other = with_strategy(model, split)
    found = [leaf for leaf in jax.tree.leaves(other) if isinstance(leaf, Strategy)]
    # Seven linears, two norms and the attention of each block, the embedding, the last norm and the head.
    assert found == [split] * (10 * len(model.blocks) + 3)
    assert other.blocks[1].attention.o_proj.strategy == split
    assert [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, Strategy)] == [SINGLE] * len(found)
    arrays = zip(
        jax.tree.leaves(eqx.filter(model, eqx.is_array)), jax.tree.leaves(eqx.filter(other, eqx.is_array)), strict=True
    )
    # One PyTree of weights serves every strategy: none is copied.
    assert all(one is two for one, two in arrays)
