import jax.numpy as jnp
import pytest
from fixtures.checkpoint import random_model, tiny, weights
from hypothesis import given, strategies as st

from mistral_eqx.checkpoint.names import TABLE, is_derived, layer_specs
from mistral_eqx.checkpoint.source import file_order


# Written out by hand from published checkpoints: layer, Hugging Face, Mistral, GGUF, and the shape in a file.
NAMES = """
embedding                        model.embed_tokens.weight                       tok_embeddings.weight            token_embd.weight         80 32
blocks.1.attention_norm          model.layers.1.input_layernorm.weight           layers.1.attention_norm.weight   blk.1.attn_norm.weight    32
blocks.1.attention.q_proj        model.layers.1.self_attn.q_proj.weight          layers.1.attention.wq.weight     blk.1.attn_q.weight       96 32
blocks.1.attention.k_proj        model.layers.1.self_attn.k_proj.weight          layers.1.attention.wk.weight     blk.1.attn_k.weight       32 32
blocks.1.attention.v_proj        model.layers.1.self_attn.v_proj.weight          layers.1.attention.wv.weight     blk.1.attn_v.weight       32 32
blocks.1.attention.o_proj        model.layers.1.self_attn.o_proj.weight          layers.1.attention.wo.weight     blk.1.attn_output.weight  32 96
blocks.1.feed_forward_norm       model.layers.1.post_attention_layernorm.weight  layers.1.ffn_norm.weight         blk.1.ffn_norm.weight     32
blocks.1.feed_forward.gate_proj  model.layers.1.mlp.gate_proj.weight             layers.1.feed_forward.w1.weight  blk.1.ffn_gate.weight     64 32
blocks.1.feed_forward.up_proj    model.layers.1.mlp.up_proj.weight               layers.1.feed_forward.w3.weight  blk.1.ffn_up.weight       64 32
blocks.1.feed_forward.down_proj  model.layers.1.mlp.down_proj.weight             layers.1.feed_forward.w2.weight  blk.1.ffn_down.weight     32 64
norm                             model.norm.weight                               norm.weight                      output_norm.weight        32
head                             lm_head.weight                                  output.weight                    output.weight             80 32
"""  # noqa: E501


def test_one_table_of_names_for_three_formats():
    config = tiny()
    found = {spec.path: spec for spec in layer_specs(config)}
    lines = [line.split() for line in NAMES.strip().splitlines()]
    assert len(lines) == len([spec for spec in TABLE if spec.belongs(config, 0)])
    for path, hf, mistral, gguf, *shape in lines:
        spec = found[path]
        assert (spec.name("hf"), spec.name("mistral"), spec.name("gguf")) == (hf, mistral, gguf)
        assert spec.file_shape(config) == tuple(map(int, shape))
        assert spec.rotary == (".q_proj" in path or ".k_proj" in path)


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_of_the_model_has_a_row(tied, getkey):
    config = tiny(tied=tied)
    arrays = weights(random_model(config, getkey(), jnp.bfloat16))
    assert {path: array.shape for path, array in arrays.items()} == {
        spec.path: spec.shape(config) for spec in layer_specs(config)
    }


def test_every_name_is_used_once():
    config = tiny()
    for format in ("hf", "mistral", "gguf"):
        names = [spec.name(format) for spec in layer_specs(config)]
        assert len(set(names)) == len(names) == 3 + 9 * config.layers


def test_derived_tables_are_known():
    assert is_derived("model.layers.3.self_attn.rotary_emb.inv_freq", "hf")
    assert is_derived("rope.freqs", "mistral")
    assert not is_derived("model.layers.3.self_attn.q_proj.bias", "hf")
    assert is_derived("rope_freqs.weight", "gguf")
    assert not is_derived("rope_freqs.bias", "gguf")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_trap_axis_order_that_leaves_the_first_and_last_rows_right_and_the_middle_wrong(kv_heads, q_per_kv, pairs):
    config = tiny(kv_heads=kv_heads, q_per_kv=q_per_kv, head_dim=2 * pairs)
    for spec in layer_specs(config):
        order = file_order(spec, config, "hf")
        expected = []
        # A pair of the rotary embedding is (2 i, 2 i + 1) here and (i, i + head_dim / 2) there, in every head.
        heads = spec.file_shape(config)[0] // config.head_dim if spec.rotary else 0
        for head in range(heads):
            for pair in range(pairs):
                expected.append(head * 2 * pairs + pair)
                expected.append(head * 2 * pairs + pair + pairs)
        if not spec.rotary:
            expected = list(range(spec.file_shape(config)[0]))
        assert order.tolist() == expected
        assert file_order(spec, config, "mistral").tolist() == sorted(expected)
        assert file_order(spec, config, "gguf").tolist() == sorted(expected)
