"""Layouts that are ranked by estimates."""

import dataclasses
import json
import math

import equinox as eqx
import jax
import jax.random as jr
import pytest
from fixtures.cli import assert_refused, run
from fixtures.generation import refused

import mistral_eqx as mx
from mistral_eqx.parallel import NAMED, Choice
from mistral_eqx.planning import (
    CHIPS,
    Memory,
    Phase,
    Training,
    exposed,
    operations,
    planning,
    rank,
    ranking,
    weights_read,
)
from mistral_eqx.planning.shapes import whole_shapes
from mistral_eqx.planning.work import device_entries


CONFIG = dataclasses.replace(mx.PRESETS["7b-v0.2"], layers=4, windows=(None,) * 4)
ONE = {"tp": 1}


@pytest.mark.parametrize("name", sorted(mx.PRESETS))
def test_the_matrices_are_all_weights_but_norms(name):
    config = mx.PRESETS[name]
    norms = (2 * config.layers + 1) * config.embed
    if config.latent is not None:
        norms += config.layers * (config.latent.q_rank + config.latent.kv_rank)
    assert device_entries(config, mx.SINGLE, ONE) == config.parameters - norms


def test_operations_of_one_device():
    entries = CONFIG.matrix_entries(0)
    sizes = {"batch": 3, "seq": 8, "context": 4.5}
    scores = 4 * 3 * 8 * CONFIG.layers * CONFIG.q_heads * CONFIG.head_dim * 4.5
    found = operations(CONFIG, mx.SINGLE, ONE, **sizes, logits=1)
    assert found == 2 * 3 * (8 * entries + CONFIG.vocab * CONFIG.embed) + scores
    # A window hides keys.
    windows = dataclasses.replace(CONFIG, windows=(2, None, None, None))
    hidden = 4 * 3 * 8 * CONFIG.q_heads * CONFIG.head_dim * 2.5
    assert operations(windows, mx.SINGLE, ONE, **sizes, logits=1) == found - hidden


@pytest.mark.parametrize("name", [name for name in NAMED if name != "experts"])
def test_devices_share_the_operations(name):
    axes = {"tp": 4} if "@tp" in NAMED[name].layout else {"kv": 2, "rep": 2}
    sizes = {"batch": 4, "seq": 16, "context": 8.5, "logits": 1}
    one = operations(CONFIG, mx.SINGLE, ONE, **sizes)
    each = operations(CONFIG, NAMED[name], axes, **sizes)
    # Where `rep` splits no keys or queries, its devices compute them more than once.
    repeated = {"kv_replicated": ("kv",), "heads_x_kv_seq": ("q", "kv")}.get(name, ())
    size = 2 * CONFIG.layers * CONFIG.embed * CONFIG.head_dim
    again = {"q": size * CONFIG.q_heads, "kv": size * CONFIG.kv_heads}
    assert 4 * each == one + 2 * 4 * 16 * sum(again[which] for which in repeated)


def test_experts_are_computed_and_read_by_what_is_chosen():
    config = mx.PRESETS["8x7b"]
    other = config.parameters - config.layers * 3 * config.experts * config.embed * config.expert_hidden
    sizes = {"batch": 1, "seq": 1, "context": 1.0, "logits": 1}
    dense = operations(dataclasses.replace(config, routing=None), mx.SINGLE, ONE, **sizes)
    one_more = 2 * config.layers * config.embed * (3 * config.expert_hidden + config.routes)
    assert operations(config, mx.SINGLE, ONE, **sizes) == dense + one_more
    # One token reads 2 of 8 experts, many tokens all of them.
    norms = (2 * config.layers + 1) * config.embed
    experts = config.parameters - other
    tables = config.vocab * config.embed
    assert weights_read(config, mx.SINGLE, ONE, tokens=1) == pytest.approx(
        (other - norms - tables + experts / 4) / (config.parameters - norms)
    )
    assert weights_read(config, mx.SINGLE, ONE, tokens=1000) == pytest.approx(
        (config.parameters - norms - tables) / (config.parameters - norms)
    )
    # All devices together compute a token once, however the experts are split.
    axes = {"ep": 8}
    split = operations(config, mx.Strategy("experts@ep"), axes, **sizes)
    whole = operations(config, mx.SINGLE, ONE, **sizes)
    assert whole - split == pytest.approx(7 / 8 * 2 * 2 * experts / 8)


def test_a_single_chip():
    found = rank(CONFIG, topology="v5p:1x1x1", batch=1, prompt=512, kv_seq=1024)
    (best,) = found.best
    chip = CHIPS["v5p"]
    assert best.label == "single (tp=1)"
    tables = CONFIG.vocab * CONFIG.embed
    assert best.memory.weights == 2 * CONFIG.parameters
    assert best.memory.cache == 2 * 2 * CONFIG.layers * CONFIG.kv_heads * CONFIG.head_dim * 1024
    read = 512 * (2 * (CONFIG.parameters - tables) + best.memory.cache * 0.75) / chip.hbm_bandwidth
    prompt = 2 * (CONFIG.parameters - tables) / chip.hbm_bandwidth
    assert best.times.memory == pytest.approx(read + prompt, rel=1e-2)
    assert best.times.bound == "memory"
    assert best.times.interconnect == 0
    assert best.tokens_per_second == pytest.approx(512 / best.seconds)


def test_memory_is_that_of_the_arrays():
    config = mx.PRESETS["gpt-nano"]
    found = rank(config, topology="v5e:2x2", batch=4, prompt=16, kv_seq=32, dtype="float32")
    assert {one.choice.name for one in found.best} >= {"copies"}
    model = mx.Mistral.init(config, key=jr.key(0))
    for one in found.best:
        split = mx.shard(model, one.choice.mesh(jax.devices()[:4]), one.choice.strategy)
        arrays = jax.tree.leaves(eqx.filter(split, eqx.is_array))
        shards = [math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in arrays]
        assert one.memory.weights == sum(shards), one.label


def test_the_best_come_first_and_others_have_reasons():
    found = rank(CONFIG, topology="v5e:4x4", objective="latency")
    seconds = [one.seconds for one in found.best]
    assert seconds == sorted(seconds)
    assert all(one.memory.total <= 0.9 * found.chip.hbm_bytes for one in found.best)
    reasons = dict(found.refused)
    assert "8 kv_heads cannot be split over 16 devices" in reasons["experts"]
    assert "A batch of 1 cannot be split" in reasons["batch@dp (dp=16)"]
    assert rank(CONFIG, topology="v5e:4x4", objective="latency") == found


def test_throughput_takes_as_many_rows_as_fit():
    found = rank(CONFIG, topology="v5e:2x2", objective="throughput", prompt=512, kv_seq=1024)
    rates = [one.tokens_per_second for one in found.best]
    assert rates == sorted(rates, reverse=True)
    best, room = found.best[0], 0.9 * found.chip.hbm_bytes
    assert best.batch > 64
    assert best.memory.total <= room < best.memory.weights + 2 * best.memory.cache
    alone = rank(CONFIG, topology="v5e:2x2", objective="latency", batch=1, prompt=512, kv_seq=1024)
    assert alone.best[0].seconds < best.seconds


def test_training_shards_what_does_not_fit():
    found = rank("7b-v0.3", topology="v5p:1x1x2", objective="train", batch=32, train=Training(seq=4096))
    best = found.best[0]
    assert best.zero is not None
    assert 0.3 < best.utilization < 1
    tokens, chips = 32 * 4096, 2 * CHIPS["v5p"].flops
    active = 6 * (mx.PRESETS["7b-v0.3"].parameters - 32768 * 4096)
    assert best.utilization == pytest.approx(active * tokens / chips / best.seconds, rel=1e-3)
    by_stage = {one.zero: one for one in found.best if one.choice == best.choice}
    assert found.too_large[0].memory.total > found.room
    state = [one.memory.weights + one.memory.gradients + one.memory.optimizer for _, one in sorted(by_stage.items())]
    assert state == sorted(state, reverse=True)


def _task(config, chip, devices, prompt=0, new_tokens=0):
    return ranking._Task(config, CHIPS[chip], devices, "bfloat16", None, None, prompt, new_tokens)


def _step(config, chip, layout, axes, batch, **options):
    """The estimate of a step with the best number of micro-batches."""
    choice = Choice("a layout", mx.Strategy(layout), axes)
    return ranking._fastest_step(_task(config, chip, math.prod(axes.values())), choice, batch, Training(**options))


def test_micro_batches_are_as_few_as_fit():
    config, room = mx.PRESETS["7b-v0.3"], 0.9 * CHIPS["v5e"].hbm_bytes
    found = _step(config, "v5e", "batch@dp", {"dp": 16}, 256, zero=3)
    count = found.training.accumulate
    assert count > 1
    assert found.memory.total <= room
    fewer = dataclasses.replace(found.training, accumulate=count // 2)
    assert ranking._step_memory(_task(config, "v5e", 16), found.choice, 256, fewer).total > room
    # A divisor that was asked for.
    assert _step(config, "v5e", "batch@dp", {"dp": 16}, 256, zero=3, accumulate=16).training.accumulate == 16
    # Without a number that fits, the least memory.
    too_large = _step(config, "v5e", "batch@dp", {"dp": 16}, 256)
    assert too_large.memory.total > room
    assert too_large.training.accumulate == 16


def test_a_pipeline_waits_for_the_bubble():
    """Of M + S - 1 ticks a stage has work in M, of M + 2 (S - 1) ticks in 1F1B, and in these a forward pass more."""
    gpipe, one_by_one = (
        _step(CONFIG, "v5p", "layers@pp", {"pp": 4}, 8, schedule=schedule) for schedule in ("gpipe", "1f1b")
    )
    assert gpipe.label == "layers@pp (pp=4, ZeRO 0, 8 micro-batches, GPipe)"
    assert one_by_one.options == "--strategy 'layers@pp' --mesh pp=4 --accumulate 8 --schedule 1f1b"
    sizes = {"batch": 8, "seq": 4096, "context": 4097 / 2}
    blocks = operations(CONFIG, mx.SINGLE, ONE, **sizes, logits=0)
    head = operations(CONFIG, mx.SINGLE, ONE, **sizes, logits=4096) - blocks
    peak, stream = CHIPS["v5p"].flops, 4096 * CONFIG.embed * 2
    # All stages compute the head, and each of four a quarter of the blocks: forward, again, and backward.
    assert gpipe.times.compute == pytest.approx((blocks + 4 * head) / peak)
    assert one_by_one.times.compute == pytest.approx((5 * blocks / 4 + 4 * head) / peak)
    permutes = 2 * (1e-6 + stream / CHIPS["v5p"].link_bandwidth)
    assert gpipe.times.bubble == pytest.approx(3 * (blocks / 8 / peak + permutes))
    assert one_by_one.times.bubble == pytest.approx(6 * ((5 * blocks / 4 + 4 * head) / 8 / peak + permutes))
    # 1F1B keeps the activations of seven micro-batches, GPipe those of 11 ticks in a layer and after it. For more
    # tokens, fewer rows of the head are there at once.
    logits = 2 * 4 * 4096 * (8 * 1024 - 2048)
    kept = gpipe.memory.temporary - one_by_one.memory.temporary
    assert kept == pytest.approx((2 * 11 - (1 + 7)) * stream + logits, abs=1)
    # Each stage has the tables, whose moments ZeRO 1 shards over the stages.
    tables = 2 * CONFIG.vocab * CONFIG.embed
    layers = CONFIG.matrix_entries(0) // 4
    assert gpipe.memory.weights == 4 * (layers + tables)
    sharded = _step(CONFIG, "v5p", "layers@pp", {"pp": 4}, 8, zero=1)
    assert sharded.memory.optimizer == 8 * (layers + tables // 4)
    assert _step(CONFIG, "v5p", "batch@dp", {"dp": 4}, 8).times.bubble == 0


def test_what_bounds_may_be_the_bubble():
    config = dataclasses.replace(CONFIG, layers=16, windows=(None,) * 16)
    # 30 of 46 ticks.
    found = _step(config, "v5p", "layers@pp", {"pp": 16}, 16, schedule="1f1b")
    assert found.times.bound == found.to_dict()["bound"] == "bubble"
    assert found.times.bubble > found.seconds / 2


def test_pipelines_are_ranked_or_have_a_reason():
    found = rank(CONFIG, topology="v5p:1x1x2", objective="train", batch=4, train=Training(seq=4096, accumulate=2))
    labels = [one.label for one in found.best]
    assert "layers@pp (pp=2, ZeRO 1, 4 micro-batches, 1F1B)" in labels
    assert "sequence_parallel overlap (tp=2, ZeRO 0, 2 micro-batches)" in labels
    assert [one.seconds for one in found.best] == sorted(one.seconds for one in found.best)
    assert not any("layers@" in label and "ZeRO 3" in label for label in labels)
    assert "layers@pp" not in dict(ranking._illegal(mx.PRESETS["8x7b"], 8, stages=True))
    uneven = dataclasses.replace(mx.PRESETS["8x7b"], routing=mx.Routing(8, 2, first_dense=2))
    reasons = dict(ranking._illegal(uneven, 8, stages=True))
    assert "only the first 2 of 32 layers are dense" in reasons["layers@pp"]
    for config in (mx.PRESETS["8x7b"], mx.PRESETS["small-4-119b"]):
        whole, half = (device_entries(config, mx.Strategy(text), {"pp": 2}, blocks=True) for text in ("", "layers@pp"))
        assert half == whole / 2
    with refused("2 micro-batches", "4 stages"):
        _step(CONFIG, "v5p", "layers@pp batch@dp", {"pp": 4, "dp": 2}, 4)
    with refused("8 rows cannot be split into 8 micro-batches", "multiple of 16"):
        _step(CONFIG, "v5p", "layers@pp batch@dp", {"pp": 2, "dp": 2}, 8, accumulate=8)


def test_overlapped_exchanges_take_what_products_wait():
    task, whole = _task(CONFIG, "v5e", 8, 4096, 128), whole_shapes(CONFIG, "bfloat16", None)
    choices = [Choice("", mx.SEQUENCE_PARALLEL + word, {"tp": 8}) for word in ("", "overlap")]
    plain, overlapped = (ranking._request(task, choice, 1, whole) for choice in choices)
    assert plain.memory == overlapped.memory
    # Eight chunks of 512 tokens, of which each layer waits for four exchanges; decoding is the same.
    sizes = {"batch": 1, "seq": 512}
    waits = [
        sum(one.wait for one in exposed(CONFIG, choice.strategy, {"tp": 8}, CHIPS["v5e"], **sizes))
        for choice in choices
    ]
    assert overlapped.seconds - plain.seconds == pytest.approx(8 * CONFIG.layers * (waits[1] - waits[0]))
    plain, overlapped = (_step(CONFIG, "v5e", choice.strategy.layout, {"tp": 8}, 8, seq=4096) for choice in choices)
    assert overlapped.times.interconnect < plain.times.interconnect
    with refused("exposed exchanges of a model with experts"):
        ranking._request(_task(mx.PRESETS["8x7b"], "v5e", 8, 16, 16), choices[1], 1, whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topology": "v5e:1x1", "batch": 4096}, ["No layout of config fits v5e:1x1", "GB more than", "fewer rows"]),
        ({"topology": "H100:16"}, ["16 GPUs", "8 at most"]),
        ({"topology": "v9:2x2"}, ["'v9:2x2'", "v5p", "H100"]),
        ({"topology": "v5e:2x2", "objective": "speed"}, ["'speed'", "latency"]),
        ({"topology": "v5e:2x2", "objective": "train", "prompt": 5}, ["no prompt"]),
        ({"topology": "v5e:2x2", "train": Training()}, ["objective='train'"]),
        ({"topology": "v5e:2x2", "objective": "train", "train": Training(seq=10**5)}, ["100000", "32768"]),
        ({"topology": "v5e:2x2", "batch": 0}, ["batch is 0"]),
    ],
)
def test_what_cannot_be_ranked_is_refused_in_one_sentence(options, words):
    with refused(*words):
        rank(CONFIG, **options)


def test_the_best_is_planned(monkeypatch):
    jobs, plan = [], mx.plan

    def compiled(job):
        jobs.append(job)
        return [Phase("decode", 1, 1, Memory(10**6), 0.0, 0, 0, (), (), 1.0, None, None)]

    monkeypatch.setattr(planning, "_compiled", compiled)
    monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: name)
    report = plan(CONFIG, topology="v5e:2x2", strategy="best", batch=4, prompt=512, kv_seq=1024)
    best = rank(CONFIG, topology="v5e:2x2", batch=4, prompt=512, kv_seq=1024).best[0]
    assert (report.layout, report.axes, report.batch) == (best.choice.strategy.layout, best.choice.axes, 4)
    (job,) = jobs
    assert (job.layout, job.axes) == (best.choice.strategy.layout, best.choice.axes)
    with refused("give a topology"):
        plan(CONFIG, devices=4, strategy="best")
    with refused("not for GPUs such as H100", "--strategy best"):
        plan(CONFIG, topology="H100:8", strategy="best")


def test_the_command_ranks():
    result = run("plan", "gpt-small", "--topology", "H100:8", "--strategy", "best", "--kv-seq", 512)
    assert result.exit_code == 0, result.stderr
    assert "gpt-small on H100:8 by latency" in result.stdout
    assert "cannot be split over" in " ".join(result.stdout.split())
    assert "The first layout is chosen by --strategy '" in result.stdout
    assert result.stderr.splitlines() == ["Estimated only: programs are compiled for TPUs."]
    options = ("--topology", "H100:2", "--strategy", "best", "--train", "--batch", 16, "--seq", 256, "--json")
    result = run("plan", "gpt-small", *options)
    (ranking,) = json.loads(result.stdout)["rankings"]
    assert ranking["objective"] == "train"
    assert {one["batch"] for one in ranking["best"]} == {16}
    assert_refused(run("plan", "gpt-small", "--devices", 4, "--strategy", "best"), "give --topology")
