"""The scaling of the rotary embedding: its numbers, its place in each format of config, and models that have it."""

import dataclasses
import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.checkpoint import assert_same_weights, random_model, tiny
from fixtures.model import (
    FLOAT32_TOLERANCE,
    SMALL,
    both_sides,
    empty_cache,
    relative_error,
    run,
    run_in_pieces,
    small_model,
)
from fixtures.sharding import mesh, sharded
from fixtures.text import tiny as vocabularies
from jax.sharding import PartitionSpec as P
from test_config import GGUF_SMOLLM2, HF_7B, HF_SMOLLM2, PARAMS_7B

import mistral_eqx as mx
from mistral_eqx.checkpoint import gguf, hf, mistral
from mistral_eqx.errors import InputError
from mistral_eqx.nn import Rotation
from mistral_eqx.parallel import Strategy
from mistral_eqx.rope import LinearScaling, Llama3Scaling, QueryScaling, Rope, YarnScaling, yarn_magnitude


MINISTRAL_3 = YarnScaling(16.0, 16384, 1.0)
DEVSTRAL_2 = YarnScaling(64.0, 4096, yarn_magnitude(64.0), beta_fast=4.0)
QUERIES = QueryScaling(0.1, 16384)


def test_yarn_of_published_models():
    """The ramps worked out by hand: 128 ln(orig / (2 pi r)) / (2 ln theta) is 20.4 and 36.4, and 23.6 and 30.02."""
    plain = Rope(128, 1e6).inv_freq
    ramp = np.concatenate([np.zeros(21), np.arange(1, 17) / 17, np.ones(27)])
    found = Rope(128, 1e6, MINISTRAL_3)
    np.testing.assert_allclose(found.inv_freq, plain * (1 - ramp) + plain / 16 * ramp, rtol=1e-14)
    assert found.magnitude == 1
    ramp = np.concatenate([np.zeros(24), np.arange(1, 8) / 8, np.ones(33)])
    found = Rope(128, 1e6, DEVSTRAL_2)
    np.testing.assert_allclose(found.inv_freq, plain * (1 - ramp) + plain / 64 * ramp, rtol=1e-14)
    assert found.magnitude == pytest.approx(1.41589, abs=1e-5)


def test_yarn_with_a_ramp_between_pairs_and_outside_the_head():
    # theta = e^8 and orig = 2 pi e^4, so that r rotations are at pair 16 (4 - ln r) / 16 = 4 - ln r.
    theta, original = math.exp(8), round(2 * math.pi * math.exp(4))
    plain = Rope(16, theta).inv_freq
    scaling = YarnScaling(2.0, original, 1.0, math.exp(2.5), math.exp(0.5), truncate=False)
    ramp = [0, 0, 0.25, 0.75, 1, 1, 1, 1]
    np.testing.assert_allclose(Rope(16, theta, scaling).inv_freq, plain * (1 - np.array(ramp) / 2), atol=1e-3)
    # Both ends below the first pair: every pair is scaled or, where they meet at 0, every pair but the first.
    scaling = YarnScaling(2.0, 4, 1.0, 32.0, 1.0)
    np.testing.assert_allclose(Rope(16, theta, scaling).inv_freq, plain / [1, 2, 2, 2, 2, 2, 2, 2])


def test_llama3_by_wavelength():
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    expected = []
    for pair in range(64):
        angle = 5e5 ** (-pair / 64)
        wavelength = 2 * math.pi / angle
        if wavelength < original / high:
            expected.append(angle)
        elif wavelength > original / low:
            expected.append(angle / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * angle / factor + smooth * angle)
    found = Rope(128, 5e5, Llama3Scaling(factor, low, high, original))
    np.testing.assert_allclose(found.inv_freq, expected, rtol=1e-14)
    assert 0 < sum(1 for one, plain in zip(expected, Rope(128, 5e5).inv_freq, strict=True) if one == plain) < 64


def test_linear_scaling_moves_positions_closer():
    positions = jnp.arange(0, 64, 4, dtype=jnp.int32)[None]
    found, expected = (
        Rotation.init(Rope(16, 1e4, LinearScaling(4.0)), positions),
        Rotation.init(Rope(16, 1e4), positions // 4),
    )
    np.testing.assert_allclose(found.cos, expected.cos, atol=1e-6)
    np.testing.assert_allclose(found.sin, expected.sin, atol=1e-6)


def test_queries_grow_at_each_multiple_and_padding_does_not():
    positions = jnp.asarray([[-1, 0, 15, 16, 47, 48]], jnp.int32)
    rotation = Rotation.init(Rope(8, 1e4), positions)
    assert rotation.of_queries(None, positions) is rotation
    grown = rotation.of_queries(QueryScaling(0.5, 16), positions)
    factors = np.hypot(grown.cos, grown.sin)[0, :, 0]
    expected = [1, 1, 1, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(3), 1 + 0.5 * math.log(4)]
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


def test_each_device_scales_its_part_of_a_head():
    rope = Rope(16, 1e4, YarnScaling(8.0, 64, 1.25), QueryScaling(0.1, 64))
    strategy, positions = Strategy("head_dim@tp"), jnp.arange(0, 900, 90, dtype=jnp.int32)[None]
    spec = strategy.spec("_ _ head_dim")

    def angles(positions):
        rotation = Rotation.init(rope, positions, strategy=strategy).of_queries(rope.query_scaling, positions)
        return rotation.cos, rotation.sin

    (cos, sin), collectives = sharded(angles, mesh(4), (positions,), (P(),), (spec, spec))
    assert collectives == {}
    whole = Rotation.init(rope, positions).of_queries(rope.query_scaling, positions)
    np.testing.assert_allclose(cos, whole.cos, atol=1e-6)
    np.testing.assert_allclose(sin, whole.sin, atol=1e-6)


SCALED = dataclasses.replace(SMALL, rope_scaling=YarnScaling(4.0, 8, 1.2), query_scaling=QueryScaling(0.3, 8))


@pytest.fixture(scope="module")
def scaled():
    return small_model(config=SCALED)


def test_positions_past_the_original_ones_with_cache_chunks_and_padding(scaled):
    ids = np.random.default_rng(0).integers(0, 61, size=(1, 40)).astype(np.int32)
    expected, _ = run(scaled, ids)
    found, _ = run_in_pieces(scaled, ids, (7, 20, *(1,) * 13), empty_cache(scaled, 1, 40))
    assert relative_error(found, expected) < FLOAT32_TOLERANCE
    rows, positions = both_sides([ids[0, :30].tolist()], 40)
    found, _ = run(scaled, rows, positions)
    assert relative_error(found[:1, 10:], expected[:, :30]) < FLOAT32_TOLERANCE
    assert relative_error(found[1:, :30], expected[:, :30]) < FLOAT32_TOLERANCE
    for change in ({"rope_scaling": None}, {"query_scaling": None}):
        other = small_model(config=dataclasses.replace(SCALED, **change))
        assert relative_error(run(other, ids)[0], expected) > 1e-2


def test_a_window_that_wraps_around(scaled):
    model = small_model(config=dataclasses.replace(SCALED, windows=(6, 6)))
    ids = np.random.default_rng(1).integers(0, 61, size=(1, 40)).astype(np.int32)
    found, _ = run_in_pieces(model, ids, (5, 5, *(1,) * 30), empty_cache(model, 1, 40))
    assert relative_error(found, run(model, ids)[0]) < FLOAT32_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["head_dim@tp hidden@tp", "kv_heads@tp", "kv_seq@tp"])
def test_tokens_of_a_sharded_model_are_those_of_one_device(scaled, layout):
    whole = mx.generate(scaled, [[5, 6, 7]], max_new_tokens=12, eos_id=())
    there = mx.shard(scaled, mesh(2), Strategy(layout))
    assert mx.generate(there, [[5, 6, 7]], max_new_tokens=12, eos_id=()).tokens.tolist() == whole.tokens.tolist()


# Every number has its own shortest decimal in float32, which is all that GGUF has.
KINDS = {
    "linear": {"rope_scaling": LinearScaling(4.0)},
    "llama3": {"rope_scaling": Llama3Scaling(32.0), "rope_theta": 5e5},
    "yarn": {"rope_scaling": YarnScaling(16.0, 16384, 1.0)},
    "yarn with its own magnitude": {"rope_scaling": DEVSTRAL_2},
    "yarn with another magnitude": {"rope_scaling": YarnScaling(8.0, 512, 1.75, 30.0, 2.5)},
    "scaled queries": {"query_scaling": QUERIES},
    "yarn and scaled queries": {"rope_scaling": MINISTRAL_3, "query_scaling": QUERIES},
    "linear and scaled queries": {"rope_scaling": LinearScaling(2.0), "query_scaling": QUERIES},
}
UNTRUNCATED = {"rope_scaling": dataclasses.replace(MINISTRAL_3, truncate=False)}
NOT_IN_PARAMS = ("linear", "llama3", "yarn with another magnitude", "linear and scaled queries")


@pytest.mark.parametrize("fields", [*KINDS.values(), UNTRUNCATED], ids=[*KINDS, "yarn without rounding"])
def test_config_json_keeps_it(fields):
    config = tiny(**fields)
    settings = json.loads(json.dumps(hf.write_config(config)))
    assert hf.read_config(settings) == config
    assert settings["model_type"] == ("ministral3" if "query_scaling" in fields else "mistral")
    for missing in ("rope_parameters", "rope_scaling"):
        assert hf.read_config({key: value for key, value in settings.items() if key != missing}) == config


@pytest.mark.parametrize("kind", KINDS)
def test_params_json_keeps_it_or_refuses_it(kind):
    config = tiny(**KINDS[kind])
    if kind in NOT_IN_PARAMS:
        with pytest.raises(InputError, match=r"params\.json can hold YaRN alone"):
            mistral.write_config(config)
    else:
        assert mistral.read_config(json.loads(json.dumps(mistral.write_config(config)))) == config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "words.gguf"
    return mx.load_tokenizer(vocabularies.write_gguf(path, **vocabularies.byte_level_metadata()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_keeps_it(kind, tokenizer, getkey, tmp_path):
    model = random_model(tiny(vocab=tokenizer.vocab, **KINDS[kind]), getkey())
    mx.save(model, tmp_path / "a.gguf", format="gguf", tokenizer=tokenizer)
    again = mx.load(tmp_path / "a.gguf")
    assert again.config == dataclasses.replace(model.config, bos_id=again.config.bos_id, eos_ids=again.config.eos_ids)
    assert_same_weights(again, model)


def test_what_a_format_cannot_hold_is_refused(tokenizer, getkey, tmp_path):
    def written_as_gguf(config):
        mx.save(random_model(config, getkey()), tmp_path / "a.gguf", format="gguf", tokenizer=tokenizer)

    apart = tiny(rope_scaling=MINISTRAL_3, query_scaling=QueryScaling(0.1, 8192), vocab=tokenizer.vocab)
    for write in (hf.write_config, written_as_gguf):
        with pytest.raises(InputError, match=r"multiples of 8192 positions and the rotary embedding from 16384"):
            write(apart)
    assert mistral.read_config(mistral.write_config(apart)) == apart
    with pytest.raises(InputError, match=r"no model type for more than one of these: windows in only some layers"):
        hf.write_config(tiny(query_scaling=QUERIES, windows=(None, 7)))
    for scaling in (UNTRUNCATED["rope_scaling"], Llama3Scaling(8.0, 1.0, 4.0, 4096)):
        with pytest.raises(InputError, match=r"has the scaling .*, which a GGUF file cannot hold; use the format 'hf'"):
            written_as_gguf(tiny(rope_scaling=scaling, vocab=tokenizer.vocab))


YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384}


@pytest.mark.parametrize(
    ("keys", "magnitude"),
    [
        ({}, 0.1 * math.log(16) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 0.1 * math.log(16) + 1),
        ({"mscale": 0.7, "mscale_all_dim": 0.3}, (0.07 * math.log(16) + 1) / (0.03 * math.log(16) + 1)),
        ({"mscale": 0.7, "mscale_all_dim": 0.3, "attention_factor": 1.5}, 1.5),
    ],
)
def test_the_magnitude_of_config_json(keys, magnitude):
    found = hf.read_config({**HF_7B, "rope_scaling": {**YARN, **keys}}).rope_scaling
    assert found.magnitude == pytest.approx(magnitude, rel=1e-15)


def test_keys_that_config_json_may_leave_out():
    whole = hf.read_config({**HF_7B, "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0}})
    old = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 16384, "beta_fast": None}
    assert hf.read_config({**HF_7B, "rope_scaling": old}) == whole
    # 32768 positions are the config's own.
    by_ratio = hf.read_config({**HF_7B, "rope_scaling": {**YARN, "factor": None}}).rope_scaling
    assert (by_ratio.factor, by_ratio.original_positions) == (2.0, 16384)
    own = hf.read_config({**HF_7B, "rope_scaling": {"type": "yarn", "factor": 2.0}}).rope_scaling
    assert own.original_positions == 32768
    ministral = {"model_type": "ministral3"}
    config = hf.read_config(ministral)
    assert (config.rope_theta, config.rope_scaling, config.query_scaling) == (1e6, MINISTRAL_3, QUERIES)
    for beta in ({}, {"llama_4_scaling_beta": None}, {"llama_4_scaling_beta": 0.0}):
        assert hf.read_config({**ministral, "rope_parameters": {**YARN, **beta}}).query_scaling is None


def test_params_json_of_ministral_3_and_devstral_2():
    yarn = {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1}
    queries = {"original_max_position_embeddings": 16384, "beta": 0.1}
    config = mistral.read_config({**PARAMS_7B, "yarn": yarn, "llama_4_scaling": queries})
    assert (config.rope_scaling, config.query_scaling) == (MINISTRAL_3, QUERIES)
    yarn = {"original_max_position_embeddings": 4096, "factor": 64, "beta": 4, "alpha": 1}
    for apply in ({}, {"apply_scale": True}):
        config = mistral.read_config({**PARAMS_7B, "yarn": {**yarn, **apply}, "llama_4_scaling": None})
        assert (config.rope_scaling, config.query_scaling) == (DEVSTRAL_2, None)


def of_mistral3(**keys):
    other = {key.replace("llama.", "mistral3."): value for key, value in GGUF_SMOLLM2.items()}
    return {**other, "general.architecture": "mistral3", **{f"mistral3.{key}": value for key, value in keys.items()}}


def float32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def test_gguf_of_llama_cpp():
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 16384}
    yarn |= {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
    config = gguf.read_config(
        of_mistral3(**yarn, **{"rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": float32(0.1)})
    )
    assert (config.rope_scaling, config.query_scaling) == (MINISTRAL_3, QUERIES)
    assert (config.layers, config.rope_theta) == (30, 1e5)
    config = gguf.read_config(of_mistral3(**yarn, **{"rope.scaling.yarn_log_multiplier": 0.0}))
    assert config.rope_scaling.magnitude == yarn_magnitude(16.0)
    # A factor without a type is linear, and one with the type "none" has no effect.
    linear = {**GGUF_SMOLLM2, "llama.rope.scaling.factor": 4.0}
    assert gguf.read_config(linear).rope_scaling == LinearScaling(4.0)
    assert gguf.read_config({**linear, "llama.rope.scaling.type": "none"}).rope_scaling is None
    assert gguf.read_config({**GGUF_SMOLLM2, "llama.rope.scaling.factor": 0.0}).rope_scaling is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rope_parameters": {**YARN, "factor": 0.5}}, r"rope_parameters\.factor of .* is 0\.5; it must be at least 1"),
        (
            {"rope_scaling": {**YARN, "factor": None, "original_max_position_embeddings": 10**6}},
            r"cannot be used: The rope",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"lacks the key rope_scaling\.factor"),
        ({"rope_scaling": {**YARN, "factor": "big"}}, r"rope_scaling\.factor of .* is 'big'"),
        ({"rope_scaling": {**YARN, "beta_fast": -1.0}}, r"rope_scaling\.beta_fast of .* is -1\.0"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, r"rope_scaling\.truncate of .* is 1; it must be true or false"),
        ({"rope_scaling": {**YARN, "long_factor": [1.0]}}, r"sets rope_scaling\.long_factor to \[1\.0\]"),
        ({"rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}}, r"sets rope_scaling\.llama_4_scaling_beta to 0\.1"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, r"has rope_scaling\.partial_rotary_factor 0\.5"),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 8.0}}, r"and otherwise in rope_scaling; keep"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, r"rope_theta is 1, but YaRN scales by wavelengths"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            r"cannot be used: The rope scaling's high_freq_factor is 4\.0 and its low_freq_factor is 4\.0",
        ),
    ],
)
def test_config_json_refuses_by_name(settings, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        hf.read_config({**HF_SMOLLM2, **settings}, file="folder/config.json")
    assert caught.value.file == "folder/config.json"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"yarn": {"factor": 16}}, r"lacks the key yarn\.original_max_position_embeddings"),
        ({"yarn": {"factor": 0, "original_max_position_embeddings": 9}}, r"yarn\.factor of .* is 0"),
        ({"yarn": {"factor": 2, "original_max_position_embeddings": 9, "gamma": 1}}, r"sets yarn\.gamma to 1"),
        ({"llama_4_scaling": {"beta": 0.1}}, r"lacks the key llama_4_scaling\.original_max_position_embeddings"),
        (
            {"llama_4_scaling": {"beta": -1, "original_max_position_embeddings": 9}},
            r"llama_4_scaling\.beta of .* -1",
        ),
        ({"yarn": 16}, r"yarn of .* is 16; it must be a table"),
    ],
)
def test_params_json_refuses_by_name(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        mistral.read_config({**PARAMS_7B, **settings})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rope.scaling.type": "longrope"}, r"has mistral3\.rope\.scaling\.type 'longrope', which is not supported"),
        ({"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 0.0}, r"rope\.scaling\.attn_factor of .* is 0\.0"),
        ({"rope.scaling.factor": -2.0}, r"mistral3\.rope\.scaling\.factor of .* is -2\.0"),
        ({"rope.scaling.yarn_ext_factor": 1.0}, r"sets mistral3\.rope\.scaling\.yarn_ext_factor to 1\.0"),
        ({"attention.temperature_scale": -0.1}, r"mistral3\.attention\.temperature_scale of .* is -0\.1"),
    ],
)
def test_gguf_refuses_by_name(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        gguf.read_config(of_mistral3(**settings))
