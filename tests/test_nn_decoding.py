"""What the compiled loop keeps in memory. Nothing runs here: XLA says what it would do."""

import dataclasses
import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from fixtures.model import small_model

from mistral_eqx.config import MistralConfig
from mistral_eqx.generation import Sampler
from mistral_eqx.generation.flat import Flat
from mistral_eqx.generation.loop import Decoding, decode
from mistral_eqx.generation.reading import read_chunk
from mistral_eqx.nn import Cache


CONFIG = MistralConfig(
    vocab=331,
    embed=64,
    hidden=96,
    layers=4,
    kv_heads=2,
    q_per_kv=2,
    head_dim=32,
    rope_theta=1e4,
    norm_eps=1e-5,
    max_positions=16384,
    windows=(None, None, None, None),
)
KV_SEQ = 4096


def _nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@functools.lru_cache
def _compiled_loop(dtype, batch, config=CONFIG, cache_dtype=None):
    """The loop as XLA compiled it, and the bytes of the keys and values that it was compiled for."""
    cache = Cache.init(config, batch, KV_SEQ, dtype, cache_dtype)
    none = jnp.zeros(batch, jnp.int32)
    decoding = Decoding.init(none, jnp.zeros(batch, bool), jr.split(jr.key(0), batch), KV_SEQ)
    model = small_model(config=config, dtype=dtype)
    kept = (Flat(model), decoding, Sampler(), jnp.zeros(2, jnp.int32), jnp.zeros((), jnp.int32))
    return decode.lower(kept, cache).compile().compiled, _nbytes(cache.layers)


def _scratch(config, batch, dtype, cache_dtype=None):
    """The most that a step may need besides weights, cache and state.

    Scores and their softmax for one layer in float32, twice over, masks, and the logits. For 16-bit floats on a CPU
    also one layer's keys and values, as floats in place of bits; for codes of 8 bits the same, dequantized.
    """
    scores = 4 * batch * config.q_heads * KV_SEQ * 4
    masks = 8 * batch * KV_SEQ
    logits = 4 * batch * config.vocab * 4
    size = jnp.dtype(dtype).itemsize
    layer = 2 * batch * config.kv_heads * KV_SEQ * config.head_dim * size if size == 2 or cache_dtype else 0
    return scores + masks + logits + layer + 64 * 1024


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_the_loop_holds_no_second_copy_of_the_cache(dtype, batch):
    compiled, size = _compiled_loop(dtype, batch)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < _scratch(CONFIG, batch, dtype)
    assert _scratch(CONFIG, batch, dtype) < 0.5 * size
    _assert_updated_in_place(compiled.as_text(), batch, dtype)


@pytest.mark.parametrize("cache_dtype", [pytest.param("int8", marks=pytest.mark.slow), "float8_e4m3"])
def test_the_loop_updates_the_codes_of_a_cache_in_place(cache_dtype):
    compiled, size = _compiled_loop("float32", 1, cache_dtype=cache_dtype)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < _scratch(CONFIG, 1, "float32", cache_dtype)
    _assert_updated_in_place(compiled.as_text(), 1, "float32", cache_dtype)
    # A quarter of float32's, and a scale for each token and head.
    entries = CONFIG.layers * 2 * CONFIG.kv_heads * KV_SEQ
    assert size == entries * (CONFIG.head_dim + 4)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [("float32", None), ("bfloat16", None), ("float32", "int8"), ("bfloat16", "float8_e4m3")]
)
@pytest.mark.slow
def test_scratch_memory_does_not_grow_with_the_layers(dtype, cache_dtype):
    more = dataclasses.replace(CONFIG, layers=6, windows=(None,) * 6)
    small, _ = _compiled_loop(dtype, 1, cache_dtype=cache_dtype)
    large, _ = _compiled_loop(dtype, 1, more, cache_dtype)
    assert large.memory_analysis().temp_size_in_bytes < small.memory_analysis().temp_size_in_bytes + 4096


@pytest.mark.parametrize("batch", [1, 4])
def test_16_bit_weights_are_not_copied_to_float32(batch):
    text = _compiled_loop("bfloat16", batch)[0].as_text()
    written = {shape for _, shape, _ in _instructions(text)}
    assert f"bf16[{CONFIG.vocab},{CONFIG.embed}]" in written
    for out, inner in ((CONFIG.vocab, CONFIG.embed), (CONFIG.hidden, CONFIG.embed), (CONFIG.embed, CONFIG.hidden)):
        assert f"f32[{out},{inner}]" not in written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_reading_a_prompt_makes_the_last_logits_only(dtype):
    batch, seq = 2, 48
    model = small_model(config=CONFIG, dtype=dtype)
    ids = jnp.zeros((batch, seq), jnp.int32)
    cache = Cache.init(CONFIG, batch, 64, dtype)
    compiled = read_chunk.lower((model, ids, ids), cache).compile().compiled
    assert compiled.memory_analysis().alias_size_in_bytes >= _nbytes(cache.layers)
    vocab = _largest_with_axis(compiled.as_text(), CONFIG.vocab)
    assert vocab == max(batch, CONFIG.embed) * CONFIG.vocab
    # A program that makes all of them is recognised.
    everything = eqx.filter_jit(lambda model, ids: model(ids)).lower(model, ids).compile().compiled
    assert _largest_with_axis(everything.as_text(), CONFIG.vocab) == batch * seq * CONFIG.vocab


def _largest_with_axis(text, size):
    """How many entries the largest array has that has an axis of this size."""
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", text)]
    sizes = []
    for shape in shapes:
        if size in shape:
            count = 1
            for axis in shape:
                count *= axis
            sizes.append(count)
    return max(sizes)


def _computations(text):
    """The lines of each computation of a compiled program, by its name."""
    found, name = {}, None
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = opened[1]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def _instructions(text):
    """Operation, shape and line of what is written to memory: not what happens inside a fused loop."""
    computations = _computations(text)
    fused = {name for line in text.splitlines() if "fusion(" in line for name in re.findall(r"calls=%?([\w.-]+)", line)}
    for name, lines in computations.items():
        if name in fused:
            continue
        for line in lines:
            if match := re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(", line):
                yield match[2], match[1], line


def _assert_updated_in_place(text, batch, dtype, cache_dtype=None):
    """Everything that is as large as one layer's keys is the buffer itself, or one slot of it being replaced."""
    computations = _computations(text)
    entries = batch * CONFIG.kv_heads * KV_SEQ * CONFIG.head_dim
    updates = 0
    for operation, shape, line in _instructions(text):
        dims = re.search(r"\[([\d,]*)\]", shape)[1]
        size = 1
        for axis in filter(None, dims.split(",")):
            size *= int(axis)
        if size < entries or operation in ("parameter", "get-tuple-element", "tuple", "while", "bitcast"):
            continue
        root = operation
        if operation == "fusion":
            (root_line,) = [one for one in computations[re.search(r"calls=%?([\w.-]+)", line)[1]] if "ROOT" in one]
            root = re.search(r"= \S+ ([\w-]+)\(", root_line)[1]
        if root == "dynamic-update-slice":
            updates += 1
            continue
        # The bits of one layer's 16-bit keys or values, as floats, or its codes, dequantized.
        assert dtype == "bfloat16" or cache_dtype, line
        assert (shape.split("[")[0], size) == ("bf16" if dtype == "bfloat16" else "f32", entries), line
        assert root in ("bitcast", "bitcast-convert"), line
    assert updates == 2 * CONFIG.layers
