import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from fixtures.model import small_model
from hypothesis import given, strategies as st
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P

from mistral_eqx.parallel import (
    HEAD_DIM,
    HEADS,
    KV_REPLICATED,
    SEQUENCE_PARALLEL,
    SINGLE,
    Strategy,
    read_strategy,
    shard,
    with_strategy,
)
from mistral_eqx.presets import PRESETS


def test_single_splits_nothing():
    assert Strategy() == SINGLE
    assert SINGLE.spec("kv_heads head_dim embed") == P(None, None, None)
    assert SINGLE.axes("kv_heads head_dim embed") == ()


def test_spec_has_one_entry_a_dimension():
    strategy = Strategy("kv_heads@kv q_per_kv@rep hidden@kv,rep")
    assert strategy.spec("kv_heads q_per_kv head_dim embed") == P("kv", "rep", None, None)
    assert strategy.spec("hidden embed") == P(("kv", "rep"), None)
    assert strategy.spec("embed") == P(None)
    assert strategy.spec("") == P()


def test_axes_names_the_axes_in_order():
    strategy = Strategy("kv_heads@kv q_per_kv@rep hidden@kv,rep")
    assert strategy.axes("kv_heads q_per_kv head_dim") == ("kv", "rep")
    assert strategy.axes("q_per_kv kv_heads") == ("rep", "kv")
    assert strategy.axes("hidden") == ("kv", "rep")
    assert strategy.axes("embed vocab") == ()
    assert strategy.axes() == ("kv", "rep")


def test_parts_are_those_of_the_mesh():
    strategy, sizes = Strategy("kv_heads@kv q_per_kv@rep hidden@kv,rep batch@dp"), {"dp": 5, "kv": 2, "rep": 3}
    for mesh in (sizes, AbstractMesh(tuple(sizes.values()), tuple(sizes))):
        found = [strategy.parts(dims, mesh) for dims in ("kv_heads", "kv_heads q_per_kv", "hidden", "batch", "embed")]
        assert found == [2, 6, 6, 5, 1]
    assert strategy.parts("hidden", None) == 1


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (SINGLE, "single"),
        (HEADS, "heads"),
        (SEQUENCE_PARALLEL, "sequence_parallel"),
        (SEQUENCE_PARALLEL + "batch@dp", "sequence_parallel batch@dp"),
        (HEADS + "batch@dp", "heads batch@dp"),
        (SEQUENCE_PARALLEL + "overlap=1 batch@dp", "sequence_parallel overlap=1 batch@dp"),
        (Strategy("batch@dp"), "batch@dp"),
        (Strategy("kv_heads@tp"), "kv_heads@tp"),
    ],
)
def test_a_name_is_read_again(strategy, name):
    assert strategy.name == name
    assert read_strategy(name) == strategy


def test_white_space_and_order_are_free():
    first, second = Strategy("  hidden@tp   vocab@tp "), Strategy("vocab@tp hidden@tp")
    for dims in ("hidden embed", "vocab embed", "embed hidden"):
        assert first.spec(dims) == second.spec(dims)


@pytest.mark.parametrize(
    "entry",
    ["hidden", "hidden@", "@tp", "hidden@tp,", "hidden@,tp", "Hidden@tp", "hidden=tp", "a@b@c", "overlap=3"],
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
    with pytest.raises(ValueError, match="has the word 'overlap' twice; keep one"):
        Strategy("tokens@tp overlap overlap=1")


def test_the_word_overlap_gives_the_number_of_directions():
    assert [SINGLE.overlap, HEADS.overlap, SEQUENCE_PARALLEL.overlap] == [0, 0, 0]
    words = "overlap", "overlap=1", "overlap=2"
    assert [(SEQUENCE_PARALLEL + word).overlap for word in words] == [2, 1, 2]
    # It splits nothing.
    assert (SEQUENCE_PARALLEL + "overlap").axes() == ("tp",)
    model, mesh = PRESETS["7b-v0.2"], AbstractMesh((2,), ("tp",))
    with pytest.raises(ValueError, match=r"has the word 'overlap' but does not split 'tokens'.*add 'tokens@'"):
        (HEADS + "overlap").check(model, mesh)
    (SEQUENCE_PARALLEL + "overlap").check(model, mesh)


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
    named = tuple(dict.fromkeys(axis for axes in layout.values() for axis in axes))
    assert strategy.axes(" ".join(dims)) == strategy.axes() == named


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


# What cannot be split.

SEVEN = PRESETS["7b-v0.2"]


def _refused(layout, axes, config=SEVEN):
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    with pytest.raises(ValueError) as error:  # noqa: PT011  (each test looks at the words)
        Strategy(layout).check(config, mesh)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message
    return message


def test_trap_heads_did_not_divide_16():
    assert _refused(HEADS.layout, {"tp": 16}) == (
        "8 kv_heads cannot be split over 16 devices; use KV_REPLICATED or HEAD_DIM."
    )
    # Both of them can.
    KV_REPLICATED.check(SEVEN, AbstractMesh((8, 2), ("kv", "rep")))
    HEAD_DIM.check(SEVEN, AbstractMesh((16,), ("tp",)))


@pytest.mark.parametrize(
    ("layout", "size", "words"),
    [
        ("q_per_kv@tp", 3, "4 q_per_kv cannot be split over 3 devices; use HEADS_X_HEAD_DIM or HEADS_X_KV_SEQ"),
        ("head_dim@tp", 3, "128 head_dim cannot be split over 3 devices; use fewer devices on that axis."),
        ("hidden@tp", 5, "14336 hidden cannot be split over 5 devices; leave 'hidden' out of the strategy"),
        ("vocab@tp", 7, "32000 vocab cannot be split over 7 devices; leave 'vocab' out"),
        ("embed@tp", 3, "4096 embed cannot be split over 3 devices; leave 'embed' out"),
        (
            "head_dim@tp",
            128,
            "128 head_dim over 128 devices would split the pairs that the rotary embedding rotates",
        ),
    ],
)
def test_what_does_not_divide_is_refused(layout, size, words):
    assert words in _refused(layout, {"tp": size})


def test_two_axes_divide_together():
    layout = "kv_heads@a,b hidden@a"
    Strategy(layout).check(SEVEN, AbstractMesh((4, 2), ("a", "b")))
    assert "8 kv_heads cannot be split over 16 devices" in _refused(layout, {"a": 4, "b": 4})


@pytest.mark.parametrize("dim", ["rank", "heads", "kvheads"])
def test_a_dimension_that_cannot_be_split_is_refused(dim):
    message = _refused(f"{dim}@tp", {"tp": 2})
    assert (
        f"splits {dim!r}, which is not a dimension that can be split; use one of batch, seq, tokens, kv_seq, vocab"
        in message
    )


def test_an_axis_that_the_mesh_lacks_is_refused():
    message = _refused(KV_REPLICATED.layout, {"dp": 2, "tp": 4})
    assert "splits 'kv_heads' over the mesh axis 'kv', but the mesh has 'dp' (2), 'tp' (4); make a mesh" in message


@pytest.mark.parametrize(
    ("layout", "array"),
    [
        ("kv_heads@tp q_per_kv@tp", "queries, keys and their scores have both"),
        ("kv_heads@tp kv_seq@tp", "queries, keys and their scores have both"),
        ("head_dim@tp kv_seq@tp", "queries, keys and their scores have both"),
        ("batch@tp kv_heads@tp", "queries, keys and their scores have both"),
        ("head_dim@tp embed@tp", "q_proj has both"),
        ("embed@tp hidden@tp", "gate_proj has both"),
        ("batch@tp hidden@tp", "the hidden activations have both"),
        ("vocab@tp embed@tp", "the embedding has both"),
        ("batch@tp vocab@tp", "the logits have both"),
        ("batch@tp embed@tp", "has both"),
        ("hidden@other,tp embed@tp", "gate_proj has both"),
    ],
)
def test_one_axis_on_two_dimensions_of_an_array_is_refused(layout, array):
    message = _refused(layout, {"tp": 2, "other": 2})
    assert "over the same axis 'tp', and" in message
    assert array in message
    assert message.endswith("give one of them another axis.")


def test_one_axis_on_dimensions_that_meet_in_no_array_is_legal():
    for layout in (HEADS.layout, "kv_seq@tp hidden@tp vocab@tp", "kv_seq@tp embed@tp", SEQUENCE_PARALLEL.layout):
        Strategy(layout).check(SEVEN, AbstractMesh((2,), ("tp",)))


@pytest.mark.parametrize("left_out", ["kv_heads", "hidden", "vocab"])
def test_seq_needs_the_sums_that_it_scatters(left_out):
    layout = " ".join(f"{dim}@tp" for dim in ("kv_heads", "hidden", "vocab", "tokens") if dim != left_out)
    message = _refused(layout, {"tp": 2})
    assert "splits 'tokens' over 'tp', but none of" in message
    assert left_out in message


def test_seq_and_embed_are_not_split_together():
    layout = "kv_heads@a hidden@a vocab@a tokens@a embed@b"
    assert "splits the residual stream by 'tokens' and by 'embed'" in _refused(layout, {"a": 2, "b": 2})


def test_a_model_is_checked_by_its_config_and_left_as_it_is():
    model = small_model()
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"2 kv_heads cannot be split over 8 devices"):
        HEADS.check(model, mesh)
    with pytest.raises(ValueError, match=r"2 kv_heads cannot be split over 8 devices"):
        shard(model, mesh, HEADS)
    assert model.mesh is None
    assert model.strategy == SINGLE


def test_rows_that_cannot_be_split_are_refused():
    model = shard(small_model(), jax.make_mesh((2,), ("dp",), axis_types=(AxisType.Auto,)), Strategy("batch@dp"))
    for call in (model, lambda ids: model.hidden(ids)[0]):
        with pytest.raises(ValueError, match=r"^3 rows cannot be split over 2 devices") as error:
            eqx.filter_jit(call)(jnp.zeros((3, 4), jnp.int32))
        assert str(error.value).count("\n") == 0


def test_an_entry_can_be_added():
    assert (HEADS + "batch@dp").layout == f"{HEADS.layout} batch@dp"
    assert Strategy("batch@dp") == SINGLE + "batch@dp"
    with pytest.raises(ValueError, match="names the dimension 'hidden' twice"):
        HEADS + "hidden@dp"
