import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import numpy_reference as reference
from fixtures.cases import every_third
from fixtures.generation import count_compilations
from fixtures.model import (
    FLOAT32_TOLERANCE,
    SMALL,
    VARIANTS,
    both_sides,
    empty_cache,
    prompt,
    recorded,
    relative_error,
    run,
    run_in_pieces,
    skip_without_import_hook,
    small_model,
    variant_model,
)
from jaxtyping import TypeCheckError

from mistral_eqx.generation import generate
from mistral_eqx.nn import Linear, Mistral, RMSNorm
from mistral_eqx.presets import PRESETS


# The recorded checkpoints whose window is 7.
WINDOWED = ("alternating", "window")


def test_every_variant_is_recorded():
    assert {"gqa_1", "gqa_3", "gqa_4", "wide_heads", "tied", "llama", "theta_1e6", *WINDOWED} <= set(VARIANTS)
    configs = {variant: variant_model(variant).config for variant in VARIANTS}
    assert [configs[f"gqa_{ratio}"].q_per_kv for ratio in (1, 3, 4)] == [1, 3, 4]
    assert configs["wide_heads"].q_heads * configs["wide_heads"].head_dim > configs["wide_heads"].embed
    assert configs["window"].windows == (7, 7, 7)
    assert configs["alternating"].windows == (None, 7, 7)
    assert configs["tied"].tied
    assert configs["theta_1e6"].rope_theta == 1e6


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_without_a_cache(variant):
    logits, cache = run(variant_model(variant), prompt(variant, 40))
    assert cache is None
    assert relative_error(logits[0], recorded(variant)["logits_40"]) < FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("pieces", "variant"),
    [
        *(
            pytest.param((1,) * 40, variant, id=f"one_at_a_time-{variant}", marks=pytest.mark.slow)
            for variant in VARIANTS
        ),
        *(pytest.param((5,) * 8, variant, id=f"chunks_of_5-{variant}") for variant in VARIANTS),
        *(pytest.param((40,), variant, id=f"whole-{variant}") for variant in (*WINDOWED, "gqa_3")),
    ],
)
def test_logits_with_a_cache(pieces, variant):
    model = variant_model(variant)
    logits, cache = run_in_pieces(model, prompt(variant, 40), pieces, empty_cache(model, 1, 44))
    assert relative_error(logits[0], recorded(variant)["logits_40"]) < FLOAT32_TOLERANCE
    assert int(cache.used) == 40
    np.testing.assert_array_equal(cache.positions, [[*range(40), -1, -1, -1, -1]])


@pytest.mark.parametrize("variant", WINDOWED)
@pytest.mark.parametrize("length", [3, 7, 8])
@pytest.mark.slow
def test_prompts_at_the_edge_of_a_window(variant, length):
    model = variant_model(variant)
    logits, _ = run(model, prompt(variant, length))
    assert relative_error(logits[0], recorded(variant)[f"logits_{length}"]) < FLOAT32_TOLERANCE
    # From there on, one token at a time, to where the window has left the prompt behind.
    pieces = (length, *(1,) * (20 - length))
    logits, _ = run_in_pieces(model, prompt(variant, 40)[:, :20], pieces, empty_cache(model, 1, 44))
    assert relative_error(logits[0], recorded(variant)["logits_40"][:20]) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_trap_masks_and_positions_not_shifted_for_padding(variant):
    """Each row gives the logits that it gives alone, whichever side its padding is on."""
    answers = recorded(variant)
    lengths = (3, 7, 8, 40)
    ids, positions = both_sides([answers[f"ids_{length}"] for length in lengths], 40)
    logits, _ = run(variant_model(variant), ids, positions)
    for row, length in enumerate(lengths * 2):
        real = logits[row][positions[row] >= 0]
        assert relative_error(real, answers[f"logits_{length}"]) < FLOAT32_TOLERANCE
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("variant", [*WINDOWED, "wide_heads"])
@pytest.mark.slow
def test_rows_of_many_lengths_are_decoded_as_each_alone(variant):
    model, answers = variant_model(variant), recorded(variant)
    lengths = np.array([3, 7, 8, 5] * 2)
    ids, positions = both_sides([answers["ids_40"][:length] for length in lengths[:4]], 8)
    logits, cache = run(model, ids, positions, empty_cache(model, 8, 24))
    for row, length in enumerate(lengths):
        real = logits[row][positions[row] >= 0]
        assert relative_error(real, answers["logits_40"][:length]) < FLOAT32_TOLERANCE
    for step in range(12):
        # What padding leaves in the cache lies before a row's prompt in one half, after it in the other.
        np.testing.assert_array_equal(cache.next_positions, lengths + step)
        ids = answers["ids_40"][lengths + step][:, None]
        logits, cache = run(model, ids, None, cache)
        assert relative_error(logits[:, 0], answers["logits_40"][lengths + step]) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("variant", [*WINDOWED, "gqa_3"])
@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(variant):
    expected = recorded(variant)["greedy_7"]
    out = generate(variant_model(variant), prompt(variant, 7), max_new_tokens=len(expected))
    np.testing.assert_array_equal(out.tokens[0], expected)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *((variant, "bfloat16") for variant in VARIANTS),
        *((variant, "float16") for variant in ("alternating", "gqa_3")),
    ],
)
@pytest.mark.slow
def test_16_bit_logits(variant, dtype):
    """They are as near to float32 as those of transformers.

    With 8 bits of mantissa (11 in float16) a rounding moves a number by up to 2^-9 of itself (2^-12). There are about
    ten roundings a layer, and sharp attention makes more of them: the bound is half as much again as the error of
    transformers' own model in the same precision. An error below a tenth of one rounding would mean that the
    model was not computed in that precision at all.
    """
    answers = recorded(variant)
    lengths = (3, 7, 8, 40)
    ids, positions = both_sides([answers[f"ids_{length}"] for length in lengths], 40)
    model = variant_model(variant, dtype)
    assert model.dtype == dtype
    logits, _ = run(model, ids, positions)
    assert logits.dtype == jnp.float32
    rounding = 2**-9 if dtype == "bfloat16" else 2**-12
    for row, length in enumerate(lengths * 2):
        error = relative_error(logits[row][positions[row] >= 0], answers[f"logits_{length}"])
        assert rounding / 10 < error < 1.5 * answers[f"{dtype}_error"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_trap_16_bit_batches_with_a_cache_on_cpu(dtype):
    """XLA on CPU refuses a 16-bit product of two batch dimensions, rows and heads, but only when it runs."""
    answers = recorded("window")
    model = variant_model("window", dtype)
    ids = np.broadcast_to(prompt("window", 40), (8, 40))
    cache = empty_cache(model, 8, 44)
    assert cache.layers[0].k.dtype == cache.layers[0].v.dtype == dtype
    logits, cache = run_in_pieces(model, ids, (8, *(1,) * 12), cache)
    assert cache.layers[0].k.dtype == cache.layers[0].v.dtype == dtype
    for row in logits:
        assert relative_error(row, answers["logits_40"][:20]) < 1.5 * answers[f"{dtype}_error"]


@pytest.mark.parametrize("pieces", [(5,) * 8, (3, 1, 1, 30, 5)], ids=["chunks", "ragged"])
@pytest.mark.slow
def test_a_cache_changes_nothing_in_float64(pieces):
    with jax.enable_x64(True):
        model = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)) if eqx.is_array(leaf) else leaf,
            variant_model("alternating"),
        )
        ids = prompt("alternating", 40)
        expected, _ = run(model, ids)
        assert expected.dtype == jnp.float64
        logits, _ = run_in_pieces(model, ids, pieces, empty_cache(model, 1, 44))
        assert relative_error(logits, expected) < 1e-12
        assert relative_error(expected[0], recorded("alternating")["logits_40"]) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("changes", [{}, {"windows": (3, None)}, {"tied": True, "q_per_kv": 1, "kv_heads": 3}], ids=str)
def test_logits_are_those_of_numpy(changes):
    model = small_model(config=dataclasses.replace(SMALL, **changes))
    ids = np.random.default_rng(0).integers(0, SMALL.vocab, 9)
    logits = eqx.filter_jit(model)(jnp.asarray(ids, jnp.int32)[None])
    assert relative_error(logits[0], reference.logits(model, ids)) < 2e-6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.slow
def test_gradient_reaches_every_weight(tied):
    config = dataclasses.replace(SMALL, tied=tied)
    model = small_model(config=config)
    ids = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model):
        return jnp.mean(model(ids) ** 2)

    gradients = gradient(model)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    assert sum(leaf.size for _, leaf in leaves) == config.parameters
    for path, leaf in leaves:
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        # All of them matter, but for the rows of tokens that were not read.
        matter = np.asarray(leaf) != 0
        assert matter.all() or (leaf is gradients.embedding.weight.value and matter[:12].all() and not tied)


def test_gradient_is_the_slope():
    model = small_model(config=dataclasses.replace(SMALL, layers=1, windows=(3,)))
    ids = jnp.arange(5, dtype=jnp.int32)[None]
    direction = jax.tree.map(lambda leaf: jnp.sign(leaf) * 0.1, eqx.filter(model, eqx.is_array))
    with jax.enable_x64(True):
        model, direction = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)) if eqx.is_array(leaf) else leaf, (model, direction)
        )

        @eqx.filter_jit
        def loss(step):
            return jnp.mean(eqx.apply_updates(model, jax.tree.map(lambda leaf: leaf * step, direction))(ids) ** 2)

        zero, little = jnp.zeros(()), jnp.asarray(1e-5)
        slope = (loss(little) - loss(-little)) / (2 * little)
        np.testing.assert_allclose(jax.grad(loss)(zero), slope, rtol=1e-8)


@pytest.mark.slow
def test_initial_weights(getkey):
    config = dataclasses.replace(SMALL, embed=128, hidden=256, vocab=1000)
    model = eqx.filter_jit(Mistral.init)(config, key=getkey())
    linears = [node for node in jax.tree.leaves(model, is_leaf=_is_linear) if _is_linear(node)]
    assert len(linears) == 7 * config.layers
    for linear in linears:
        # What writes to the residual stream is smaller, by the root of the number of such writes.
        std = 0.02 / np.sqrt(2 * config.layers) if linear.out_dims == "embed" else 0.02
        assert np.std(linear.weight.value) == pytest.approx(std, rel=0.05)
        assert abs(np.mean(linear.weight.value)) < std / 20
    for table in (model.embedding, model.head):
        assert np.std(table.weight.value) == pytest.approx(0.02, rel=0.05)
    for norm in (model.norm, model.blocks[0].attention_norm, model.blocks[1].feed_forward_norm):
        assert np.all(np.asarray(norm.weight) == 1)
    values = np.stack([np.asarray(block.attention.q_proj.weight.value) for block in model.blocks])
    assert np.unique(values).size > 0.99 * values.size


@pytest.mark.parametrize("name", every_third(PRESETS))
def test_presets_without_their_memory(name):
    config = PRESETS[name]
    model = eqx.filter_eval_shape(Mistral.init, config, key=jax.random.key(0), dtype=jnp.bfloat16)
    heads = (config.kv_heads, config.q_per_kv, config.head_dim)
    assert len(model.blocks) == config.layers
    for block, window in zip(model.blocks, config.windows, strict=True):
        attention = block.attention
        assert attention.window == window
        assert attention.scale == pytest.approx(config.head_dim**-0.5)
        if (latent := config.latent) is not None:
            assert attention.q_b_proj.weight.value.shape == (config.kv_heads, config.head_dim, latent.q_rank)
            assert attention.kv_b_proj.weight.value.shape == (config.kv_heads, latent.expanded, latent.kv_rank)
            assert attention.o_proj.weight.value.shape == (config.embed, config.kv_heads, latent.value_dim)
            continue
        assert attention.q_proj.weight.value.shape == (*heads, config.embed)
        assert attention.k_proj.weight.value.shape == (config.kv_heads, config.head_dim, config.embed)
        assert attention.v_proj.weight.value.shape == (config.kv_heads, config.head_dim, config.embed)
        assert attention.o_proj.weight.value.shape == (config.embed, *heads)
    experts = () if config.routing is None else (config.experts,)
    assert block.feed_forward.down_proj.weight.value.shape == (*experts, config.embed, config.expert_hidden)
    assert (model.head is None) == config.tied
    arrays = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.ShapeDtypeStruct)]
    assert sum(leaf.size for leaf in arrays) == config.parameters
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype(jnp.bfloat16)}


def test_trap_sizes_as_globals():
    """No module knows a size but from its arrays: the only integers in them are windows."""
    model = small_model(config=dataclasses.replace(SMALL, windows=(5, None)))
    modules, seen = [model], set()
    while modules:
        module = modules.pop()
        for field in dataclasses.fields(module):
            value = getattr(module, field.name)
            if isinstance(value, eqx.Module):
                modules.append(value)
            elif isinstance(value, tuple):
                modules.extend(value)
            elif isinstance(value, int):
                seen.add((type(module).__name__, field.name))
            else:
                assert (
                    eqx.is_array(value)
                    or value is None
                    or isinstance(value, float | str)
                    or field.name
                    in (
                        "strategy",
                        "config",
                    )
                )
    assert seen == {("Attention", "window")}
    # The config is for limits and for files; a model with a wrong one computes the same, if the angles are right.
    ids = jnp.arange(6, dtype=jnp.int32)[None]
    wrong = dataclasses.replace(SMALL, vocab=1, embed=2, hidden=3, kv_heads=7, q_per_kv=5, norm_eps=0.5)
    assert wrong.rope == SMALL.rope
    other = dataclasses.replace(model, config=wrong)
    np.testing.assert_array_equal(eqx.filter_jit(model)(ids), eqx.filter_jit(other)(ids))


def test_trap_positions_of_rope_wrong_after_the_first_token():
    model = small_model()
    ids = np.arange(10, dtype=np.int32)[None]
    expected, _ = run(model, ids)
    _, cache = run(model, ids[:, :4], None, empty_cache(model, 1, 16))
    wrong = cache
    for at in range(4, 10):
        # The position is told or not told: it is the same one.
        told, _ = run(model, ids[:, at : at + 1], np.array([[at]], np.int32), cache)
        found, cache = run(model, ids[:, at : at + 1], None, cache)
        np.testing.assert_array_equal(told, found)
        assert relative_error(found[:, 0], expected[:, at]) < FLOAT32_TOLERANCE
    # The test sees a position that stands still.
    found, _ = run(model, ids[:, 4:5], np.array([[3]], np.int32), wrong)
    assert relative_error(found[:, 0], expected[:, 4]) > 0.05


def test_trap_mask_of_the_prompt_reused_while_decoding():
    """A decoded token sees the prompt, every decoded token before it and itself, and nothing that is not there yet."""
    model = small_model(config=dataclasses.replace(SMALL, layers=1, windows=(None,)))
    ids = np.arange(10, dtype=np.int32)[None]
    pieces = (4, *(1,) * 6)
    logits, _ = run_in_pieces(model, ids, pieces, empty_cache(model, 1, 16))
    for changed in range(10):
        other, _ = run_in_pieces(model, _with_token(ids, changed), pieces, empty_cache(model, 1, 16))
        differs = np.abs(other - logits).max(axis=-1)[0]
        assert np.all(differs[:changed] == 0)
        assert np.all(differs[changed:] > 1e-3)
    # Nor does it see what happens to lie in the slots that are not used.
    cache = empty_cache(model, 1, 16)
    full = jax.tree.map(lambda buffer: jnp.full_like(buffer, 3.0), cache.layers)
    dirty = eqx.tree_at(lambda cache: cache.layers, cache, full)
    np.testing.assert_array_equal(run_in_pieces(model, ids, pieces, dirty)[0], logits)


def test_a_window_hides_what_is_behind_it():
    model = small_model(config=dataclasses.replace(SMALL, layers=1, windows=(3,)))
    ids = np.arange(10, dtype=np.int32)[None]
    pieces = (2, *(1,) * 8)
    logits, _ = run_in_pieces(model, ids, pieces, empty_cache(model, 1, 16))
    other, _ = run_in_pieces(model, _with_token(ids, 4), pieces, empty_cache(model, 1, 16))
    differs = np.any(other != logits, axis=-1)[0]
    # A query sees itself and the two before it.
    np.testing.assert_array_equal(differs, [False] * 4 + [True] * 3 + [False] * 3)


def test_trap_growing_concatenation_compiles_anew_for_each_token():
    model = small_model()
    ids = np.arange(33, dtype=np.int32)[None]
    _, cache = run(model, ids[:, :3], None, empty_cache(model, 1, 33))
    shapes = jax.tree.map(jnp.shape, cache)
    with count_compilations() as compiled:
        _, cache = run(model, ids[:, 3:4], None, cache)
        assert compiled
        compiled.clear()
        for at in range(4, 33):
            _, cache = run(model, ids[:, at : at + 1], None, cache)
        assert not compiled
    assert jax.tree.map(jnp.shape, cache) == shapes
    assert int(cache.used) == 33


def test_wrong_shapes_are_refused_at_the_door(request):
    skip_without_import_hook(request)
    model = small_model()
    ids = jnp.zeros((1, 4), jnp.int32)
    wrong = [
        lambda: model(ids[0]),
        lambda: model(ids.astype(jnp.float32)),
        lambda: model.hidden(ids, ids[:, :3]),
        lambda: model.logits(jnp.zeros((4, SMALL.embed))),
        lambda: RMSNorm(jnp.ones((2, 3)), 1e-5),
        lambda: model.blocks[0].feed_forward(jnp.zeros((1, 4, SMALL.embed), jnp.int32)),
    ]
    for call in wrong:
        with pytest.raises(TypeCheckError):
            call()


def _with_token(ids, at):
    """A copy with another token in one place."""
    changed = ids.copy()
    changed[0, at] = 50
    return changed


def _is_linear(node):
    return isinstance(node, Linear)
