"""Plans of quantized weights, compared with the arrays of models that are really quantized."""

import dataclasses
import io
import json
import math
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.cases import every_third
from fixtures.checkpoint import random_model
from fixtures.generation import refused
from fixtures.model import SMALL
from rich.console import Console

import mistral_eqx as mx
from mistral_eqx.parallel import read_strategy
from mistral_eqx.parallel.mesh import parse_axes
from mistral_eqx.planning import CHIPS, Memory, Phase, Report, planning, smallest
from mistral_eqx.planning.programs import Job, programs
from mistral_eqx.quant import Layer


# A device has 16 rows of each weight or more, so that kernels have panels, and 32 inputs or more.
CONFIG = dataclasses.replace(
    SMALL, vocab=64, embed=64, hidden=128, layers=1, kv_heads=2, q_per_kv=2, head_dim=32, windows=(None,)
)
WIDE = dataclasses.replace(CONFIG, embed=256, hidden=1024, head_dim=256)
SCHEMES = {
    "int8": mx.Int8(),
    "int8 with zeros": mx.Int8(by="column", zero_point=True),
    "w8a8": mx.Int8(by=32, activations="int8"),
    "int4": mx.RTN(group_size=32),
    "int3": mx.RTN(bits=3, group_size=16),
    "nf4": mx.NF4(32),
    "nf4 across dimensions": mx.NF4(64),
    "fp8": mx.FP8(),
    "fp8 of a tensor": mx.FP8(by="tensor", activations="float8_e4m3"),
    "Q8_0": mx.GGUF("Q8_0"),
    "MXFP4": mx.GGUF("MXFP4"),
    "BF16": mx.GGUF("BF16"),
    "recipe": {"*.down_proj": mx.Int8(by=32), "*.q_proj": None, "blocks.*": mx.NF4(16), "embedding": mx.GGUF("Q8_0")},
}


def planned(config, scheme, strategy, axes, dtype="bfloat16"):
    axes, layout = parse_axes(axes), read_strategy(strategy).layout
    count = math.prod(axes.values())
    job = Job(config, None, count, layout, axes, 2, 20, 64, dtype, quantize=scheme)
    # As the process that compiles gets it.
    *_, decode = programs(pickle.loads(pickle.dumps(job)), jax.devices()[:count])
    return decode


def assert_plan_is_of_the_quantized_model(config, scheme, strategy, axes):
    model = random_model(config, jr.key(0), dtype="bfloat16")
    small = mx.quantize(mx.shard(model, mx.make_mesh(axes), read_strategy(strategy)), scheme)
    shapes = planned(config, scheme, strategy, axes)
    arrays = jax.tree_util.tree_leaves_with_path(eqx.filter(small, eqx.is_array))
    found = jax.tree_util.tree_leaves_with_path(shapes.kept[0].tree)
    found = {path: leaf for path, leaf in found if isinstance(leaf, jax.ShapeDtypeStruct)}
    assert len(found) == len(arrays)
    for path, array in arrays:
        assert (found[path].shape, found[path].dtype) == (array.shape, array.dtype), path
        assert found[path].sharding.is_equivalent_to(array.sharding, array.ndim), path
    first = jax.devices()[0]
    one = [shard.data.nbytes for _, array in arrays for shard in array.addressable_shards if shard.device == first]
    assert shapes.memory.weights == sum(one)


@pytest.mark.parametrize("name", every_third(SCHEMES))
def test_a_plan_has_the_arrays_of_the_quantized_model(name):
    assert_plan_is_of_the_quantized_model(CONFIG, SCHEMES[name], "heads", "tp=2")


@pytest.mark.parametrize(
    ("scheme", "strategy", "axes"),
    [
        (mx.GGUF("Q4_K_M"), "heads", "tp=2"),
        ({"*": mx.GGUF("Q3_K_M")}, "kv_replicated", "kv=2,rep=2"),
        (mx.NF4(64), "head_dim batch@dp", "dp=2,tp=2"),
        # Eight rows of the head a device, which are not a panel.
        ({"*": mx.GGUF("Q8_0")}, "vocab@tp", "tp=8"),
    ],
)
@pytest.mark.slow
def test_mixtures_and_other_strategies(scheme, strategy, axes):
    assert_plan_is_of_the_quantized_model(WIDE, scheme, strategy, axes)


@pytest.mark.parametrize("name", every_third(SCHEMES))
def test_a_weight_of_zeros_is_that_of_the_numbers_zero(name):
    """Its shapes are those of quantized numbers, and it is zero."""
    if isinstance(SCHEMES[name], dict):
        return
    for panels in (False, True):
        layer = Layer("layer", 2, panels=panels)
        found, expected = SCHEMES[name].zeros((2, 32, 64), layer), SCHEMES[name].weight(np.ones((2, 32, 64)), layer)
        assert eqx.tree_equal(
            jax.tree.map(jnp.zeros_like, eqx.filter(expected, eqx.is_array)), eqx.filter(found, eqx.is_array)
        )
        np.testing.assert_array_equal(found.dense(), np.zeros((2, 32, 64)))


def float_bytes(config, bits, group=None):
    """The bytes of a model whose blocks' linear layers have numbers of so many bits, and a scale of 4 bytes."""
    q = config.kv_heads * config.q_per_kv * config.head_dim
    kv = config.kv_heads * config.head_dim
    layers = [(q, config.embed), (kv, config.embed), (kv, config.embed), (config.embed, q)]
    layers += [(config.hidden, config.embed)] * 2 + [(config.embed, config.hidden)]
    numbers = sum(rows * columns for rows, columns in layers)
    scales = sum(rows if group is None else rows * columns // group for rows, columns in layers)
    norms, tables = (2 * config.layers + 1) * config.embed, 2 * config.vocab * config.embed
    return config.layers * (numbers * bits // 8 + 4 * scales), 2 * (norms + tables)


@pytest.mark.parametrize(
    ("scheme", "kind", "bits", "group"), [(mx.Int8(), "INT8", 8, None), (mx.NF4(), "NF4/64", 4, 64)]
)
def test_the_smallest_number_of_chips_holds_weights_and_cache(scheme, kind, bits, group):
    config = dataclasses.replace(mx.PRESETS["7b-v0.2"], layers=4, windows=(None,) * 4)
    blocks, rest = float_bytes(config, bits, group)
    one = smallest(config, "v5p", quantize=scheme, batch=1, kv_seq=32_768)
    assert (one.devices, one.strategy) == (1, "single")
    assert one.formats == {kind: blocks, "bfloat16": rest}
    assert one.cache == 2 * config.layers * 8 * 128 * 32_768 * 2
    assert one.total == one.weights + one.cache <= 0.9 * CHIPS["v5p"].hbm_bytes
    assert one.all_weights == blocks + rest
    # A chip of one's own, of which two hold what one v5p does.
    own = dataclasses.replace(CHIPS["v5p"], name="own", hbm_bytes=int(0.7 * one.total / 0.9))
    two = smallest(config, own, quantize=scheme, batch=1, kv_seq=32_768)
    assert (two.devices, two.chip) == (2, own)
    assert mx.Strategy(two.layout).parts("kv_heads", two.axes) == 2
    more = smallest(config, "v5e", quantize=scheme, batch=64, kv_seq=32_768)
    # Half as many devices would hold twice as much each: what is split is all but the norms.
    assert more.total <= 0.9 * CHIPS["v5e"].hbm_bytes < 2 * more.total


def test_no_number_of_chips_is_refused():
    with refused("does not fit into 1024 chips v5e", "kv_seq 32768"):
        smallest("7b-v0.2", "v5e", batch=2**20, kv_seq=32_768)
    with refused("'v9'", "v5p"):
        smallest("7b-v0.2", "v9")


def test_a_split_that_cuts_blocks_is_refused_as_in_loading():
    """The sentence is that of `shard`, and comes before anything is compiled."""
    scheme = mx.GGUF("Q8_0")
    model = mx.quantize(random_model(CONFIG, jr.key(0)), scheme)
    with pytest.raises(mx.InputError) as expected:
        mx.shard(model, mx.make_mesh("tp=2"), mx.HEAD_DIM)
    assert "o_proj is stored in 1 unit along head_dim" in str(expected.value)
    with pytest.raises(mx.InputError) as found:
        mx.plan(CONFIG, devices=2, strategy="head_dim", quantize=scheme, kv_seq=64)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": mx.NF4(64), "train": True}, ["training", "quantize"]),
        ({"quantize": mx.NF4(96)}, ["64 inputs", "96", "32"]),
        ({"quantize": {"*.up": mx.NF4()}}, ["'*.up'"]),
        ({"quantize": "nf4"}, ["'nf4'", "mx.NF4()"]),
    ],
)
def test_what_cannot_be_quantized_is_refused(options, words):
    with refused(*words):
        mx.plan(CONFIG, devices=1, strategy="single", **options)


def test_a_report_has_the_bytes_by_format(monkeypatch):
    jobs = []

    def compiled(job):
        jobs.append(job)
        return [Phase("decode", 1, 1, Memory(10**6), 0.0, 0, 0, (), (), 1.0, None, None)]

    monkeypatch.setattr(planning, "_compiled", compiled)
    report = mx.plan(CONFIG, devices=2, quantize=mx.NF4(32), batch=2, kv_seq=64)
    blocks, rest = float_bytes(CONFIG, 4, 32)
    norms = 2 * (2 * CONFIG.layers + 1) * CONFIG.embed
    # Two devices each have half of all but the norms.
    assert report.formats == {"NF4/32": blocks // 2, "bfloat16": (rest - norms) // 2 + norms}
    assert jobs[0].quantize == mx.NF4(32)
    assert Report.from_dict(json.loads(report.to_json())) == report
    out = io.StringIO()
    Console(file=out, width=200).print(report.table())
    assert "heads (tp=2, NF4/32)" in out.getvalue()
    assert f"{blocks / 2e6:,.1f} MB in NF4/32" in out.getvalue()


@pytest.mark.long
def test_a_quantized_model_is_compiled():
    """XLA counts the same arrays, and the loop's operations are those of floats and of the codes."""
    options = {"devices": 2, "batch": 2, "prompt": 16, "kv_seq": 64}
    plain, small = (mx.plan(CONFIG, quantize=scheme, **options) for scheme in (None, mx.NF4(32)))
    assert [phase.name for phase in small.phases] == ["prefill", "grow", "decode"]
    for phase in small.phases:
        assert phase.memory.weights == sum(small.formats.values()) < plain[phase.name].memory.weights
        assert phase.memory.cache == plain[phase.name].memory.cache
        # Ids, positions, the state of the loop and logits, and nothing of the size of a weight.
        assert 0 <= phase.memory.other < 8000
    assert [phase.written for phase in small.phases] == [phase.written for phase in plain.phases]
