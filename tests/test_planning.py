"""Plans, held to known answers: what a device has, what is exchanged, and the time that figures allow."""

import dataclasses
import importlib.util
import io
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from fixtures.model import SMALL
from rich.console import Console

import mistral_eqx as mx
from mistral_eqx.generation.reading import prompt_width
from mistral_eqx.parallel import Choice, read_strategy
from mistral_eqx.parallel.mesh import parse_axes
from mistral_eqx.planning import (
    CHIPS,
    HOP_SECONDS,
    Exchange,
    Memory,
    Phase,
    Report,
    Roofline,
    decoding_step,
    exchange_seconds,
    picture,
    prefill,
    roofline,
)
from mistral_eqx.planning.arguments import count_devices, lengths_of
from mistral_eqx.planning.programs import Job, programs
from mistral_eqx.planning.report import read_phase
from mistral_eqx.planning.worker import _measure


CONFIG = dataclasses.replace(SMALL, vocab=272, hidden=80, kv_heads=4, q_per_kv=2, head_dim=16, max_positions=1024)
BATCH, PROMPT, KV_SEQ = 2, 20, 64


def measured(strategy, axes, *, config=CONFIG, dtype="float32", **sizes):
    """The phases for virtual devices, compiled in this process."""
    axes, layout = parse_axes(axes), read_strategy(strategy).layout
    count = math.prod(axes.values())
    sizes = {"batch": BATCH, "prompt": PROMPT, "kv_seq": KV_SEQ, **sizes}
    job = Job(config=config, topology=None, devices=count, layout=layout, axes=axes, dtype=dtype, **sizes)
    found = [read_phase(_measure(program, job)) for program in programs(job, jax.devices()[:count])]
    assert all(phase.refused is None for phase in found)
    return {phase.name: phase for phase in found}


@pytest.fixture(scope="module")
def heads():
    return measured("heads", "tp=4")


def weight_bytes(config, *, heads=1, queries=1, head_dim=1, hidden=1, vocab=1, size=4):
    """What one device has of the weights, where these dimensions are cut into so many parts."""
    kv = config.embed * config.kv_heads * config.head_dim // (heads * head_dim)
    block = 2 * kv + 2 * kv * config.q_per_kv // queries + 3 * config.embed * config.hidden // hidden
    norms = (2 * config.layers + 1) * config.embed
    tables = 2 * config.vocab * config.embed // vocab
    return size * (config.layers * block + norms + tables)


def cache_bytes(config, kv_seq, parts, size=4):
    return 2 * config.layers * BATCH * config.kv_heads * kv_seq * config.head_dim * size // parts


@pytest.mark.parametrize(
    ("strategy", "axes", "parts", "cache_parts"),
    [
        ("heads", "tp=4", {"heads": 4, "hidden": 4, "vocab": 4}, 4),
        ("head_dim", "tp=4", {"head_dim": 4, "hidden": 4, "vocab": 4}, 4),
        # Keys and values, and what makes them, are there twice.
        ("kv_replicated", "kv=4,rep=2", {"heads": 4, "queries": 2, "hidden": 8, "vocab": 8}, 4),
        ("heads_x_head_dim", "kv=4,rep=2", {"heads": 4, "head_dim": 2, "hidden": 8, "vocab": 8}, 8),
        ("heads batch@dp", "dp=2,tp=4", {"heads": 4, "hidden": 4, "vocab": 4}, 8),
    ],
)
def test_each_device_has_its_part_of_weights_and_cache(strategy, axes, parts, cache_parts):
    job = Job(CONFIG, None, 8, read_strategy(strategy).layout, parse_axes(axes), BATCH, PROMPT, KV_SEQ, "bfloat16")
    found = {program.name: program for program in programs(job, jax.devices())}
    assert {program.memory.weights for program in found.values()} == {weight_bytes(CONFIG, size=2, **parts)}
    assert found["prefill"].memory.cache == cache_bytes(CONFIG, prompt_width(PROMPT), cache_parts, 2)
    assert found["decode"].memory.cache == cache_bytes(CONFIG, KV_SEQ, cache_parts, 2)
    # While a cache grows, the old one and the new one are there.
    assert found["grow"].memory.cache == found["prefill"].memory.cache + found["decode"].memory.cache


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3"])
def test_a_quantized_cache_has_a_byte_a_number_and_scales(cache_dtype):
    layout, axes = mx.HEADS_X_HEAD_DIM.layout, {"kv": 4, "rep": 2}
    job = Job(CONFIG, None, 8, layout, axes, BATCH, PROMPT, KV_SEQ, "bfloat16", cache_dtype)
    *_, decode = programs(job, jax.devices())
    # The devices that split `head_dim` have the same scales.
    scales = cache_bytes(CONFIG, KV_SEQ, 4) // CONFIG.head_dim
    assert decode.memory.cache == cache_bytes(CONFIG, KV_SEQ, 8, 1) + scales


def test_split_slots_are_the_same_number_on_each_device():
    job = Job(CONFIG, None, 8, mx.HEADS_X_KV_SEQ.layout, {"kv": 4, "rep": 2}, BATCH, PROMPT, KV_SEQ, "float32")
    *_, decode = programs(job, jax.devices())
    # Each has room for one that belongs to the other.
    assert KV_SEQ + 2 <= decode.given.kv_seq < 2 * KV_SEQ
    assert decode.memory.cache == cache_bytes(CONFIG, decode.given.kv_seq, 8)


def test_arguments_are_what_xla_counts(heads):
    for name in ("prefill", "decode"):
        memory = heads[name].memory
        assert memory.weights == weight_bytes(CONFIG, heads=4, hidden=4, vocab=4)
        assert memory.cache == cache_bytes(CONFIG, KV_SEQ if name == "decode" else prompt_width(PROMPT), 4)
        # Ids, positions, the state of the loop and logits, and nothing of the size of a weight.
        assert 0 < memory.other < 8000
        assert memory.total == memory.weights + memory.cache + memory.other + memory.temporary + memory.code


def test_the_loop_updates_the_cache_in_place():
    """A copy of one layer's keys would be seen."""
    memory = measured("heads", "tp=4", kv_seq=1024)["decode"].memory
    assert memory.temporary < memory.cache / CONFIG.layers / 2


@pytest.mark.parametrize(("strategy", "each"), [("heads", 2), ("head_dim", 3)])
@pytest.mark.slow
def test_a_layer_exchanges_two_or_three_sums(strategy, each):
    found = measured(strategy, "tp=4")
    embedding, choice = 1, 2
    for name, more in (("prefill", embedding), ("decode", embedding + choice)):
        (written,) = found[name].written
        (compiled,) = found[name].exchanges
        assert written.kind == compiled.kind == "all_reduce"
        assert written.devices == compiled.devices == 4
        assert written.count == each * CONFIG.layers + more
        # XLA may send several at once.
        assert compiled.count <= written.count
        assert compiled.bytes == written.bytes


@pytest.mark.parametrize(
    ("strategy", "axes"),
    [
        ("sequence_parallel", "tp=4"),
        ("heads_x_kv_seq batch@dp", "dp=2,kv=2,rep=2"),
        ("heads exchange=int8", "tp=4"),
    ],
)
@pytest.mark.slow
def test_what_is_written_is_the_closed_form(strategy, axes):
    split, found, axes = read_strategy(strategy), measured(strategy, axes), parse_axes(axes)
    job = Job(CONFIG, None, math.prod(axes.values()), split.layout, axes, BATCH, PROMPT, KV_SEQ, "float32")
    slots = {program.name: program.given.kv_seq for program in programs(job, jax.devices())}
    sizes = {"batch": BATCH, "dtype": "float32"}
    forms = {
        "prefill": prefill(CONFIG, split, axes, seq=prompt_width(PROMPT), kv_seq=slots["prefill"], **sizes),
        "decode": decoding_step(CONFIG, split, axes, kv_seq=slots["decode"], **sizes),
    }
    for name, entries in forms.items():
        expected = {}
        for entry in entries:
            count, total = expected.get((entry.kind, entry.devices), (0, 0))
            expected[entry.kind, entry.devices] = count + entry.count, total + entry.count * entry.bytes
        assert {(one.kind, one.devices): (one.count, one.bytes) for one in found[name].written} == expected


def test_operations_of_the_loop_are_those_of_one_token(heads):
    """Twice the weights that a token meets, and the scores; XLA adds what is small in a real model."""
    matrices = (weight_bytes(CONFIG, heads=4, hidden=4, vocab=4) // 4) - CONFIG.vocab * CONFIG.embed // 4
    attention = 2 * CONFIG.layers * CONFIG.q_heads // 4 * KV_SEQ * CONFIG.head_dim
    least = 2 * BATCH * (matrices + attention)
    assert least < heads["decode"].flops < 1.5 * least
    ratio = heads["prefill"].flops / heads["decode"].flops
    assert 0.5 * prompt_width(PROMPT) < ratio < 1.5 * prompt_width(PROMPT)


def test_long_prompts_are_read_in_pieces():
    config = dataclasses.replace(CONFIG, layers=1, windows=(None,))
    job = Job(config, None, 1, "", {"tp": 1}, BATCH, 700, 1024, "float32")
    first, *_ = programs(job, jax.devices()[:1])
    assert prompt_width(700) == 704
    assert (first.runs, first.tokens, first.given.kv_seq) == (2, 512, 704)


def test_a_prompt_that_fills_the_cache_lets_nothing_grow():
    assert list(measured("heads", "tp=4", prompt=64, kv_seq=64)) == ["prefill", "decode"]


# Of the whole call, with the process that it starts.


@pytest.fixture(scope="module")
def report():
    return mx.plan(
        CONFIG, devices=8, strategy=mx.KV_REPLICATED, batch=BATCH, prompt=PROMPT, kv_seq=KV_SEQ, dtype="float32"
    )


@pytest.mark.slow
def test_a_plan_says_what_it_is_of(report):
    assert (report.model, report.parameters) == ("config", CONFIG.parameters)
    assert (report.place, report.devices, report.chip) == ("8 virtual devices", 8, None)
    # The first of this strategy's meshes.
    assert (report.strategy, report.axes) == ("kv_replicated", {"kv": 4, "rep": 2})
    assert [phase.name for phase in report.phases] == ["prefill", "grow", "decode"]
    assert report["decode"].memory.cache == cache_bytes(CONFIG, KV_SEQ, 4)
    # Without a chip there is nothing to compare with.
    assert (report.fits, report.free, report["decode"].seconds) == (None, None, None)
    with pytest.raises(KeyError):
        report["train"]


def test_json_has_everything(report):
    fields = json.loads(report.to_json())
    assert Report.from_dict(fields) == report
    assert fields["phases"][2]["memory"]["total"] == report["decode"].memory.total


@pytest.mark.slow
def test_a_plan_allocates_no_weights():
    """3.6 GB of bfloat16, and neither process takes a third of that."""
    check = (
        "import dataclasses, resource, mistral_eqx as mx\n"
        "config = dataclasses.replace(mx.PRESETS['small-3-24b'], layers=1, windows=(None,))\n"
        "report = mx.plan(config, devices=2, strategy=mx.HEADS, batch=2, prompt=16, kv_seq=1024)\n"
        "assert report['decode'].memory.weights > 1.6e9\n"
        "assert report['decode'].memory.temporary < 50e6, report['decode'].memory\n"
        # Not its own `ru_maxrss`, which begins with that of the process that started it.
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(peak.split()[1]) * 1024)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(int(line) < 1.2e9 for line in done.stdout.split()), done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["topology such as 'v4:2x2x4'"]),
        ({"devices": 0}, ["devices is 0"]),
        ({"devices": 8, "topology": "v4:2x2x4"}, ["leave out devices=8"]),
        ({"topology": "v4-32"}, ["'v4-32'", "'v4:2x2x4'"]),
        ({"topology": "v9:2x2"}, ["'v9:2x2'", "v5e"]),
        ({"topology": "v5e:2x2x2"}, ["2 sides", "'v5e:2x2'"]),
        ({"devices": 16}, ["8 kv_heads", "KV_REPLICATED"]),
        ({"devices": 8, "strategy": "tensor"}, ["'tensor'", "heads_x_kv_seq"]),
        ({"devices": 8, "strategy": "heads hidden@tp"}, ["'hidden' twice"]),
        ({"devices": 8, "mesh": "tp=4"}, ["tp=4 takes 4", "there are 8"]),
        ({"devices": 8, "mesh": "tp=eight"}, ["'tp=eight'"]),
        ({"devices": 8, "strategy": "kv_heads@a hidden@b"}, ["a and b", "mesh='a=2,b=2'"]),
        ({"devices": 8, "strategy": "heads batch@dp", "mesh": "dp=2,tp=4", "batch": 3}, ["multiple of 2"]),
        ({"devices": 8, "batch": 0}, ["batch is 0"]),
        ({"devices": 8, "prompt": 5000}, ["5000 tokens", "4096 slots"]),
        ({"devices": 8, "kv_seq": 10**6}, ["1000000", "32768"]),
        ({"devices": 8, "dtype": "int8"}, ["'int8'", "bfloat16"]),
        ({"devices": 8, "train": True, "cache_dtype": "int8"}, ["no cache", "cache_dtype"]),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(options, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        mx.plan("7b-v0.2", **options)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("context", "lengths"), [(16, (8, 16)), (256, (128, 256)), (32768, (512, 4096))])
def test_lengths_that_nobody_gave_fit_the_model(context, lengths):
    assert lengths_of(dataclasses.replace(CONFIG, max_positions=context), None, None) == lengths


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="no preset '7b'"):
        mx.plan("7b", devices=8)


def test_without_libtpu_one_sentence_tells_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mistral-eqx\[tpu\]'"):
        mx.plan("7b-v0.2", topology="v5e:2x4")


def test_names_of_strategies():
    assert read_strategy("single") == mx.SINGLE
    assert read_strategy(" KV-Replicated batch@dp") == mx.KV_REPLICATED + "batch@dp"
    assert read_strategy("hidden@tp") == mx.Strategy("hidden@tp")
    for choice in mx.strategies(mx.PRESETS["7b-v0.2"], 16):
        assert isinstance(choice, Choice)


# Times.


def test_time_on_the_links_is_that_of_a_ring():
    chip = CHIPS["v4"]
    ring = 2 * chip.link_bandwidth
    assert exchange_seconds(chip, Exchange("all_reduce", 16, 3, 3 << 20)) == pytest.approx(
        3 * 16 * HOP_SECONDS + 2 * 15 / 16 * (3 << 20) / ring
    )
    assert exchange_seconds(chip, Exchange("all_gather", 8, 1, 1 << 20)) == pytest.approx(
        4 * HOP_SECONDS + 7 * (1 << 20) / ring
    )
    assert exchange_seconds(chip, Exchange("reduce_scatter", 8, 1, 1 << 20)) == pytest.approx(
        4 * HOP_SECONDS + 7 / 8 * (1 << 20) / ring
    )
    # An all_reduce is a reduce_scatter and an all_gather of what that gives.
    whole, part = 1 << 20, (1 << 20) // 8
    assert exchange_seconds(chip, Exchange("all_reduce", 8, 1, whole)) == pytest.approx(
        exchange_seconds(chip, Exchange("reduce_scatter", 8, 1, whole))
        + exchange_seconds(chip, Exchange("all_gather", 8, 1, part))
    )
    # Between two there is one link.
    assert exchange_seconds(chip, Exchange("all_reduce", 2, 1, 1 << 20)) == pytest.approx(
        2 * HOP_SECONDS + (1 << 20) / chip.link_bandwidth
    )


def test_the_longest_time_bounds():
    chip = CHIPS["v5e"]
    times = roofline(chip, 197e9, 819e7, [Exchange("all_reduce", 2, 1, 10**5)])
    assert times.compute == pytest.approx(1e-3)
    assert times.memory == pytest.approx(10e-3)
    assert times.interconnect == pytest.approx(2e-6 + 2e-6)
    assert (times.seconds, times.bound) == (times.memory, "memory")


def test_figures_of_the_chips_are_of_their_pages():
    figures = {
        name: (chip.flops, chip.hbm_bandwidth, 2 * chip.links * chip.link_bandwidth) for name, chip in CHIPS.items()
    }
    assert {name: figures[name] for name in ("A100", "H100", "H200", "B200")} == {
        "A100": (312e12, 2039e9, 600e9),
        "H100": (989e12, 3350e9, 900e9),
        "H200": (989e12, 4800e9, 900e9),
        "B200": (2250e12, 8000e9, 1800e9),
    }
    assert {name: figures[name] for name in CHIPS if CHIPS[name].switched is None} == {
        "v4": (275e12, 1200e9, 600e9),
        "v5e": (197e12, 819e9, 400e9),
        "v5p": (459e12, 2765e9, 1200e9),
        "v6e": (918e12, 1638e9, 800e9),
        # Half of a chip.
        "tpu7x": (1153.5e12, 3690e9, 600e9),
    }
    assert count_devices("tpu7x:2x2x1", None) == 2 * count_devices("v5p:2x2x1", None) == 8
    for name, gigabytes in {"v4": 32, "v5e": 16, "v5p": 96, "v6e": 32, "tpu7x": 96}.items():
        assert gigabytes - 1.5 < CHIPS[name].hbm_bytes / 2**30 <= gigabytes
        assert CHIPS[name].source.startswith("https://docs.cloud.google.com/tpu/docs/")


def made_up(temporary, *, refused=None, strategy="heads"):
    """A report of a v5e on which a phase needs that much besides 4 GB."""
    exchange = (Exchange("all_reduce", 8, 65, 4 * 10**6),)
    phases = tuple(
        Phase(
            name,
            runs,
            512,
            Memory(3 * 10**9, 10**9, 0, size, 0),
            1e12,
            4 * 10**9,
            0,
            exchange,
            exchange,
            1.0,
            None if refused else Roofline(5e-3, 5e-3, 1e-3),
            refused,
        )
        for name, runs, size in (("prefill", 8, 0), ("decode", 1, temporary))
    )
    place, axes = "v5e:2x4", {"tp": 8}
    layout = mx.HEADS.layout
    return Report("7b", 7 * 10**9, place, 8, CHIPS["v5e"], strategy, layout, axes, 8, 4096, 8192, "bfloat16", phases)


def test_a_plan_tells_whether_it_fits_or_by_how_much_not():
    has = CHIPS["v5e"].hbm_bytes
    small, large = made_up(10**9), made_up(20 * 10**9, refused="Ran out of memory.")
    assert (small.fits, small.free, small.peak.name) == (True, has - 5 * 10**9, "decode")
    assert (large.fits, large.free) == (False, has - 24 * 10**9)
    assert small["prefill"].seconds == pytest.approx(8 * 5e-3)
    # What the compiler refuses does not fit, whatever the sum says.
    assert made_up(0, refused="Ran out of memory.").fits is False
    console = Console(width=160, record=True, file=io.StringIO())
    for report in (small, large):
        console.print(report.table())
    text = console.export_text()
    assert f"fits, with {small.free / 1e9:.2f} GB free of 16.91 GB" in text
    assert f"does not fit; decode takes {-large.free / 1e9:.2f} GB more than the 16.91 GB that a v5e has" in text
    assert "prefill x 8" in text


def test_pictures(tmp_path, report):
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ValueError, match=r"pip install 'mistral-eqx\[plot\]'"):
            report.picture(tmp_path / "plan.png")
        return
    for name, reports in {
        "one.png": [made_up(10**9)],
        "some.svg": [made_up(10**9), made_up(20 * 10**9, refused="Ran out of memory.", strategy="head_dim")],
        "virtual.png": [report],
    }.items():
        picture(reports, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000
    assert "does not fit" in (tmp_path / "some.svg").read_text()
    with pytest.raises(ValueError, match="no report"):
        picture([], tmp_path / "none.png")


@pytest.mark.long
def test_the_example(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "plan.py"))["main"]()
    refused, *_, head_dim, kv_seq = capsys.readouterr().out.splitlines()
    assert refused == (
        "6 kv_heads cannot be split over 4 devices; use KV_REPLICATED or HEAD_DIM; strategy='head_dim' with "
        "mesh='tp=4' fits."
    )
    layers = mx.PRESETS["gpt-mini"].layers
    assert head_dim.startswith(f"head_dim: each new token takes {3 * layers + 3} all_reduce of ")
    assert kv_seq.startswith("heads_x_kv_seq: each new token takes ")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra tpu, is not installed.")
def test_a_plan_for_a_tpu():
    config = dataclasses.replace(mx.PRESETS["7b-v0.2"], layers=2, windows=(None, None))
    report = mx.plan(config, topology="v4:2x2x4", strategy="kv_replicated", batch=8, prompt=16, kv_seq=4096)
    assert (report.devices, report.axes, report.fits) == (16, {"kv": 8, "rep": 2}, True)
    decode = report["decode"]
    assert decode.memory.weights == weight_bytes(config, heads=8, queries=2, hidden=16, vocab=16, size=2)
    assert decode.memory.cache == 2 * 2 * 8 * 8 * 4096 * 128 * 2 // 8
    # What is exchanged stays bfloat16, and the cache stays in place.
    assert decode.exchanges == decode.written
    assert decode.memory.temporary < decode.memory.cache / 4
    # All but the embedding is read once, keys and values too, and at most written back.
    table = config.vocab * config.embed * 2 // 16
    read = decode.memory.weights - table + decode.memory.cache
    assert 0.7 * read < decode.hbm_bytes < 1.1 * (read + decode.memory.cache)
    assert decode.roofline is not None
    assert decode.roofline.seconds > decode.hbm_bytes / 1200e9 * 0.99
    with pytest.raises(ValueError, match="libtpu refuses the topology 'v4:3x5x7'"):
        mx.plan(config, topology="v4:3x5x7", strategy="single", mesh="tp=105")
