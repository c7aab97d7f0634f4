"""Several processes on this machine, as on several hosts: the same results as one, and one end for all."""

import json
import re
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.checkpoint import weights
from fixtures.cli import run, save_tiny_model
from fixtures.equality import precision
from fixtures.model import relative_error, small_model
from fixtures.multi_host import (
    PROMPTS,
    SIZES,
    batches,
    engine_requests,
    environment,
    finish,
    free_port,
    samplings,
    start,
)
from fixtures.trainer import At, Losses, host_batches, model as one_model, trainer

import mistral_eqx as mx


# What float32 sums in another order cost, relative to the largest logit.
BOUND = 5e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints of one shape, one of them on the one host and the other on the other."""
    folder = tmp_path_factory.mktemp("hosts")
    config = mx.MistralConfig(**SIZES)
    mx.save(small_model(config=config), folder / "model", format="hf")
    mx.save(small_model(1, config=config), folder / "other", format="hf")
    return folder


def words(folder, check, number):
    """What a process printed, and what it said on stderr."""
    return tuple((folder / f"{check}-{number}.{stream}").read_text() for stream in ("out", "err"))


@pytest.mark.long
def test_four_processes_of_four_devices_give_the_tokens_and_logits_of_one(folder):
    # A quarter of a minute on two cores that have nothing else to do.
    codes = finish(start("sharded_runs", 4, 4, folder), seconds=240)
    assert codes == [0] * 4, words(folder, "sharded_runs", 0)[1] + words(folder, "sharded_runs", 1)[1]
    model = mx.load(folder / "model")
    logits = np.asarray(eqx.filter_jit(model)(jnp.asarray([row[:2] for row in PROMPTS])))
    expected = {
        kind: np.asarray(mx.generate(model, PROMPTS, max_new_tokens=12, **options).tokens)
        for kind, options in samplings(mx, jr).items()
    }
    assert not np.array_equal(expected["greedy"], expected["sampled"])
    for number in range(4):
        found = np.load(folder / f"found-{number}.npz")
        for name, share, kinds in (("kv_replicated", 1 / 4, ("greedy", "sampled")), ("batch", 1, ("sampled",))):
            for kind in kinds:
                np.testing.assert_array_equal(found[f"{name}_{kind}"], expected[kind])
            assert relative_error(found[f"{name}_logits"], logits) < BOUND
            # A host has the parts of its own devices; with the batch over hosts, that is all of the model.
            assert found[f"{name}_share"] == share


@pytest.mark.long
def test_an_engine_of_two_processes_gives_the_tokens_of_one(folder):
    codes = finish(start("engine_runs", 2, 4, folder), seconds=240)
    assert codes == [0] * 2, words(folder, "engine_runs", 0)[1] + words(folder, "engine_runs", 1)[1]
    model, found = mx.load(folder / "model"), json.loads((folder / "engine.json").read_text())
    assert [finish for finish, _ in found] == ["length", "length", "length", "cancelled"]
    for request, (_, ids) in zip(engine_requests(mx)[:3], found, strict=False):
        sampler = mx.Sampler(request.temperature, processors=[mx.LogitBias(request.logit_bias)])
        key = jr.fold_in(jr.key(request.seed), 0)
        out = mx.generate(model, [request.prompt], max_new_tokens=10, eos_id=(), sampler=sampler, key=key)
        assert ids == out.tokens[0].tolist()


@pytest.mark.slow
def test_hosts_train_together_end_together_and_go_on(folder):
    """The losses are those of one process, before and after one of two hosts was told to end."""
    codes = finish(start("training", 2, 2, folder), seconds=240)
    assert codes == [0, 0], words(folder, "training", 0)[1] + words(folder, "training", 1)[1]
    found = [json.loads((folder / f"trained-{number}.json").read_text()) for number in range(2)]
    assert found[0] == found[1]
    assert found[0]["ended"] == 128 + signal.SIGTERM
    assert 3 <= found[0]["reached"] < 100
    expected = Losses()
    trainer(None, expected).fit(one_model(), host_batches(), steps=found[0]["reached"] + 3)
    # The same sums in float32 in another order, a few roundings a step.
    np.testing.assert_allclose(list(found[0]["losses"].values()), list(expected.losses.values()), rtol=2e-5)
    # Host 0 alone wrote the figures.
    assert len((folder / "run/training.csv").read_text().splitlines()) > 3


# A layer for each stage, whose tensors are large beside the rows by which copies of a checkpoint are compared.
STAGES = mx.MistralConfig(**SIZES | {"layers": 4, "windows": (None,) * 4, "hidden": 1024, "embed": 64})
MORE = 7


@pytest.mark.slow
def test_four_processes_are_the_stages_of_a_pipeline_until_one_is_killed(folder):
    """Each reads its own layers; the losses are those of one device, and of another layout from the last checkpoint."""
    mx.save(small_model(config=STAGES), folder / "layers")
    started = start("stages", 4, 4, folder)
    codes = finish(started, seconds=240)
    ended = time.time()
    said = [words(folder, "stages", number)[1] for number in range(4)]
    assert codes == [1, 1, -signal.SIGKILL, 1], said[0] + said[2]
    assert ended - float((folder / "killed").read_text()) < 30
    for number in (0, 1, 3):
        assert f"Error: Process 2 is gone, so process {number} ends too" in said[number]

    size, reports = 4 * STAGES.parameters, [json.loads((folder / f"stages-{n}.json").read_text()) for n in range(4)]
    for report in reports:
        # A stage, the table, the head and the norm; and the first and the last row of each tensor.
        outer = 4 * (2 * STAGES.vocab * STAGES.embed + STAGES.embed)
        assert report["held"] == outer + (size - outer) // 4
        assert report["held"] < report["read"] < 1.1 * report["held"] < size / 3
        assert report["losses"] == reports[0]["losses"]

    expected, kept, resumed = Losses(), [], Losses()
    options = {"dtype": "float64", "accumulate": 4, "remat": "none"}
    with precision("float64"):
        keep = At(2, lambda run: kept.append(jax.tree.map(np.array, weights(run.state.model))))
        trainer(None, expected, keep, **options).fit(mx.load(folder / "layers"), batches(MORE), steps=MORE)
        model = mx.load(folder / "layers", mesh=mx.make_mesh("dp=2,tp=2"), strategy=mx.HEADS + "batch@dp")
        trainer(folder / "staged", resumed, **options).fit(model, batches(MORE), steps=MORE)
    # The checkpoint that was being written when the process died may be lost, and those before it are whole.
    assert min(resumed.losses) in (3, 5)
    found = {int(step): loss for step, loss in reports[0]["losses"].items()} | resumed.losses
    for step, loss in found.items():
        # Float64 has 16 digits, of which AdamW loses some where a gradient is near 0.
        np.testing.assert_allclose(loss, expected.losses[step], rtol=1e-10)
    saved = weights(mx.load_stacked(folder / "trained", mesh=mx.make_mesh("tp=1"), strategy=mx.SINGLE))
    for path, exact in kept[0].items():
        # A rounding to float32.
        np.testing.assert_allclose(saved[path], exact, rtol=2**-23, atol=1e-9, err_msg=path)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


# Process 0 has JAX's own service, and ends in another way than the others.
@pytest.mark.parametrize(("victim", "processes"), [(2, 4), (0, 2)])
@pytest.mark.slow
def test_a_process_that_is_killed_while_decoding_ends_the_others_with_a_sentence(folder, victim, processes):
    started = start("endless", processes, 1, folder)
    deadline = time.monotonic() + 120
    while "decoded" not in words(folder, "endless", 1)[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    started[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    codes = finish(started)
    assert time.monotonic() - killed < 30
    assert "decoded" in words(folder, "endless", 1)[0], words(folder, "endless", 1)[1]
    for number, code in enumerate(codes):
        if number != victim:
            assert code not in (0, None)
            assert words(folder, "endless", number)[1].splitlines()[-1] == (
                f"Error: Process {victim} is gone, so process {number} ends too; it was killed, or its machine or the "
                "network failed."
            )


@pytest.mark.slow
def test_a_process_that_is_killed_while_all_save_leaves_nothing_behind(folder):
    mx.save(mx.load(folder / "other"), folder / "saved")
    codes = finish(start("saving", 2, 1, folder))
    assert codes == [1, -signal.SIGKILL], words(folder, "saving", 0)[1]
    assert "Error: Process 1 is gone, so process 0 ends too" in words(folder, "saving", 0)[1]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    np.testing.assert_array_equal(
        mx.load(folder / "saved").embedding.weight.value, mx.load(folder / "other").embedding.weight.value
    )


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(folder):
    assert finish(start("failing", 3, 1, folder), seconds=30) == [1, 1, 1]
    assert words(folder, "failing", 1)[1].splitlines()[-1] == "ValueError: This host has no disk."
    for number in (0, 2):
        assert words(folder, "failing", number)[1] == (
            f"Error: Process 1 has failed, so process {number} ends too; the error of process 1 says why.\n"
        )


@pytest.mark.slow
def test_processes_that_were_told_otherwise_are_refused_on_all(folder):
    codes = finish(start("disagreeing", 2, 2, folder))
    assert codes == [0, 0], words(folder, "disagreeing", 0)[1]
    first, second = (json.loads((folder / f"refused-{number}.json").read_text()) for number in range(2))
    assert first == second
    for what in ("strategy", "checkpoint"):
        assert f"The {what} is not the same on all processes: 1 differs from 0" in first[what]
    assert "connected already" in first["again"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def commands(*arguments, processes=2, stdin="", cache):
    """Runs a command in several processes, of which the first one has a stdin."""
    place = ["--coordinator", f"localhost:{free_port()}", "--num-processes", str(processes), "--process-id"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mistral_eqx", *map(str, arguments), *place, str(number)],
            stdin=subprocess.PIPE if number == 0 else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), "MISTRAL_EQX_CACHE": str(cache)},
        )
        for number in range(processes)
    ]
    return [
        (*process.communicate(stdin if number == 0 else None, timeout=120), process.returncode)
        for number, process in enumerate(started)
    ]


@pytest.mark.long
def test_on_the_command_line_only_process_0_prints(tiny, tmp_path):
    options = ("generate", "--model", tiny, "-n", 9, "--ignore-eos", "--mesh", "kv=2,rep=2")
    (text, figures, code), *others = commands(*options, stdin="Call me\n", cache=tmp_path)
    assert code == 0, figures
    assert text == run("generate", "Call me", "--model", tiny, "-n", 9, "--ignore-eos").stdout
    assert re.fullmatch(
        r"prompt 8 tokens \| loaded .* \| strategy kv_replicated on kv=2,rep=2 of 2 processes \| .*\n", figures
    )
    assert others == [("", "", 0)]


@pytest.mark.long
def test_turns_reach_all_processes_of_a_chat(tiny, tmp_path):
    turns = "Hi\nAnd you?\n"
    options = ("chat", "--model", tiny, "-n", 6)
    (text, said, code), *others = commands(*options, stdin=turns, cache=tmp_path)
    assert (said, code) == ("", 0)
    assert text == run(*options, input=turns).stdout
    assert others == [("", "", 0)]


@pytest.mark.slow
def test_each_process_says_what_is_wrong_with_it(tiny, tmp_path):
    found = commands("generate", "Hi", "--model", tiny, "--mesh", "tp=3", processes=3, cache=tmp_path)
    for number, (text, said, code) in enumerate(found):
        where = f" in process {number}" if number else ""
        assert said == f"Error{where}: 2 kv_heads cannot be split over 3 devices; use KV_REPLICATED or HEAD_DIM.\n"
        assert (text, code) == ("", 2)
