"""Plans of training, held to known answers: what a device has, computes and exchanges in a step."""

import dataclasses
import importlib.util
import io
import json
import math

import jax
import pytest
from fixtures.cli import assert_refused, run
from fixtures.generation import refused
from fixtures.model import SMALL
from rich.console import Console

import mistral_eqx as mx
from mistral_eqx.parallel import Choice, read_strategy
from mistral_eqx.planning import CHIPS, Exchange, Report, Training, planning, ranking, training_step
from mistral_eqx.planning.programs import Job, programs
from mistral_eqx.planning.report import read_phase
from mistral_eqx.planning.stablehlo import written
from mistral_eqx.planning.worker import _measure


LAYERS = 4
CONFIG = dataclasses.replace(
    SMALL, vocab=64, embed=32, hidden=64, layers=LAYERS, windows=(None,) * LAYERS, kv_heads=4, q_per_kv=2, head_dim=8
)
AXES, STRATEGY = {"dp": 2, "tp": 2}, mx.HEADS + "batch@dp"
BATCH, SEQ = 4, 16
# Norms are not split by HEADS.
NORMS = (2 * LAYERS + 1) * CONFIG.embed


def job(training, **changes):
    count = math.prod(AXES.values())
    return Job(CONFIG, None, count, STRATEGY.layout, AXES, BATCH, 0, 0, "float32", training=training, **changes)


def program(**options):
    (step,) = programs(job(Training(SEQ, **options)), jax.devices()[:4])
    return step


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.slow
def test_each_device_has_its_part_of_the_state(zero):
    """4 bytes of each weight and each gradient, 8 of its moments, split by the strategy and then by the stage."""
    memory = program(zero=zero).memory
    local = (CONFIG.parameters - NORMS) // 2 + NORMS
    parts = [2 if zero >= stage else 1 for stage in (3, 2, 1)]
    weights, gradients, moments = (size * local // part for size, part in zip((4, 4, 8), parts, strict=True))
    assert (memory.weights, memory.gradients) == (weights, gradients)
    # Adam counts its steps.
    assert memory.optimizer == moments + 4
    offloaded = program(zero=zero, offload=True).memory
    assert (offloaded.optimizer, offloaded.host) == (0, memory.optimizer)
    assert offloaded.total == memory.total - memory.optimizer


@pytest.fixture(scope="module")
def phase():
    return read_phase(_measure(program(zero=3), job(Training(SEQ, zero=3))))


@pytest.mark.slow
def test_a_step_is_measured(phase):
    assert (phase.name, phase.runs, phase.tokens, phase.refused) == ("step", 1, SEQ, None)
    # Ids and what goes with them, six arrays of two rows; then metrics, counts, and XLA's table of some 50 results.
    assert 0 < phase.memory.other - 6 * 4 * BATCH // 2 * SEQ < 500
    assert phase.memory.code >= 0


def test_operations_of_a_step_are_those_of_its_weights(phase):
    """Two for each weight and token forward, again, and twice two backward; the head is not computed again."""
    tokens = BATCH // 2 * SEQ
    block = (
        CONFIG.embed * CONFIG.head_dim * CONFIG.kv_heads * (2 + 2 * CONFIG.q_per_kv) + 3 * CONFIG.embed * CONFIG.hidden
    )
    scores = CONFIG.q_heads * SEQ * CONFIG.head_dim * 2
    # A block's last product is not computed again either.
    layers = LAYERS * (8 * (block + scores) - 2 * CONFIG.embed * CONFIG.hidden)
    assert phase.flops == tokens * (layers + 6 * CONFIG.vocab * CONFIG.embed) / 2


def test_what_is_written_is_the_closed_form(phase):
    totals = {}
    for one in training_step(CONFIG, STRATEGY, AXES, batch=BATCH, training=Training(SEQ, 3), dtype="float32"):
        count, size = totals.get((one.kind, one.devices), (0, 0))
        totals[one.kind, one.devices] = count + one.count, size + one.count * one.bytes
    assert {(one.kind, one.devices): (one.count, one.bytes) for one in phase.written} == totals


@pytest.fixture
def compiled(monkeypatch, phase):
    """Plans without another process."""
    jobs = []
    monkeypatch.setattr(planning, "_compiled", lambda job: jobs.append(job) or [phase])
    return jobs


def _staged(config, layout, axes, training):
    """The program of a step of a pipeline, and what it exchanges as it is written."""
    job = Job(config, None, math.prod(axes.values()), layout, axes, 8, 0, 0, "float32", training=training)
    (step,) = programs(job, jax.devices()[: job.devices])
    return step, {(one.kind, one.devices): (one.count, one.bytes) for one in written(step.lower("cpu"))}


@pytest.mark.parametrize(
    ("layout", "axes", "training"),
    [
        ("layers@pp batch@dp", {"pp": 2, "dp": 2}, Training(SEQ, 1, accumulate=4)),
        pytest.param(
            "kv_heads@tp hidden@tp vocab@tp layers@pp",
            {"pp": 2, "tp": 2},
            Training(SEQ, accumulate=8, schedule="1f1b"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_pipeline_is_counted_in_closed_form(layout, axes, training):
    """Its exchanges as they are written, and the arrays of one device: 4 bytes of a weight, 8 of its moments."""
    strategy = mx.Strategy(layout)
    step, exchanged = _staged(CONFIG, layout, axes, training)
    totals = {}
    for one in training_step(CONFIG, strategy, axes, batch=8, training=training, dtype="float32"):
        count, size = totals.get((one.kind, one.devices), (0, 0))
        totals[one.kind, one.devices] = count + one.count, size + one.count * one.bytes
    assert exchanged == totals
    task = ranking._Task(CONFIG, CHIPS["v5e"], math.prod(axes.values()), "float32", None, None, 0, 0)
    found = ranking._step(task, Choice("pipeline", strategy, axes), 8, training).memory
    # Norms are left out: those of two layers, and the last one, which is split as the table is.
    norms = (2 * LAYERS // 2 + 1) * CONFIG.embed
    assert step.memory.weights - found.weights == step.memory.gradients - found.gradients == 4 * norms
    shards = 4 if training.zero else 1
    outer, dp = CONFIG.embed / shards, 2 if training.zero else 1
    assert step.memory.optimizer - found.optimizer == 8 * ((norms - CONFIG.embed) // dp + outer) + 4


def test_a_report_says_how_it_trains(compiled):
    training = Training(SEQ, 3, accumulate=2, offload=True)
    report = mx.plan(CONFIG, devices=4, strategy=STRATEGY, mesh=AXES, batch=4, dtype="float32", train=training)
    assert compiled[0].training == report.training == training
    assert (report.batch, report.prompt, report.kv_seq) == (4, 0, 0)
    assert Report.from_dict(json.loads(report.to_json())) == report
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "batch 4, 16 tokens a row, in 2 micro-batches, remat block" in text
    assert "heads batch@dp (dp=2,tp=2, ZeRO 3, offload)" in text
    assert "gradients" in text
    assert "cache" not in text


def test_the_command_plans_several_stages(compiled):
    options = ("--devices", 4, "--strategy", "batch@dp", "--mesh", "dp=4", "--batch", 8, "--seq", 64, "--remat", "dots")
    result = run("plan", "gpt-nano", *options, "--train", "--zero", 1, "--zero", 3, "--json")
    assert result.exit_code == 0, result.stderr
    assert [job.training for job in compiled] == [Training(64, zero, remat="dots") for zero in (1, 3)]
    assert [Report.from_dict(fields).training.zero for fields in json.loads(result.stdout)] == [1, 3]
    options = ("--devices", 3, "--strategy", "layers@pp", "--batch", 6, "--seq", 64, "--accumulate", 3)
    result = run("plan", "gpt-nano", *options, "--train", "--schedule", "1f1b")
    assert "layers@pp (pp=3, ZeRO 0, 1F1B)" in " ".join(result.stdout.split())
    assert compiled[-1].training == Training(64, accumulate=3, schedule="1f1b")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "heads", "train": Training(zero=2)}, ["ZeRO 2", "'batch'", "batch@dp"]),
        ({"train": Training(zero=4)}, ["ZeRO stage 4"]),
        ({"batch": 3, "train": True}, ["batch of 3", "multiple of 2"]),
        ({"batch": 6, "train": Training(accumulate=2)}, ["batch of 6", "2 micro-batches", "multiple of 4"]),
        ({"train": Training(seq=10**6)}, ["1000000", "32768"]),
        ({"strategy": "layers@tp", "train": Training(accumulate=4)}, ["4 micro-batches", "8 stages", "at least 8"]),
        ({"train": True, "prompt": 512}, ["no prompt"]),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(options, words):
    mesh = {"dp": 2, "tp": 4} if "strategy" not in options else {"tp": 8}
    with refused(*words):
        mx.plan("7b-v0.2", devices=8, **{"strategy": "heads batch@dp", "mesh": mesh, **options})


def test_bad_numbers_of_a_training():
    with refused("no rematerialisation policy 'all'", "'block'"):
        Training(remat="all")
    with refused("seq is 0"):
        Training(seq=0)
    with refused("accumulate is -1"):
        Training(accumulate=-1)


def test_without_training_its_options_are_refused():
    assert_refused(run("plan", "7b-v0.2", "--devices", 8, "--zero", 1), "--zero", "--train")
    assert_refused(run("plan", "7b-v0.2", "--devices", 8, "--offload"), "--offload", "--train")
    assert_refused(run("plan", "7b-v0.2", "--devices", 8, "--train", "--remat", "all"), "'all'", "'block'")


def test_the_third_stage_keeps_no_activations_of_gathered_weights():
    with refused("ZeRO 3", "remat='none'"):
        program(zero=3, remat="none").lower("cpu")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra tpu, is not installed.")
def test_a_step_for_a_tpu():
    config = dataclasses.replace(mx.PRESETS["gpt-nano"], max_positions=256)
    training = Training(256, 3, offload=True)
    report = mx.plan(config, topology="v5e:2x2", strategy=read_strategy("batch@dp"), batch=4, train=training)
    step = report["step"]
    assert report.fits
    assert step.memory.host > 0 == step.memory.optimizer
    assert step.roofline is not None
    # What a loop of layers exchanges counts as often as there are layers.
    assert sum(one.bytes for one in step.exchanges) >= 0.9 * sum(one.bytes for one in step.written)
    assert all(isinstance(one, Exchange) for one in step.exchanges)
