"""A run is the same run however often it ends and goes on."""

import csv
import dataclasses
import multiprocessing
import os
import signal
import types
import weakref

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
import pytest
from fixtures.generation import refused
from fixtures.trainer import CONFIG, SEQ, At, Losses, batches, keep_programs as keep_programs, model, stop, trainer

import mistral_eqx as mx
from mistral_eqx import train


STEPS = 8


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is never interrupted: its losses, its model, its folder."""
    folder, seen = tmp_path_factory.mktemp("whole"), Losses()
    run = trainer(folder, seen, save_every=3, evaluate_every=4, evaluate_on=list(batches(2, seed=1)))
    return seen, run.fit(model(), batches(STEPS), steps=STEPS), folder


class Counted:
    """Batches that can tell where they are, and be set there, as Grain's."""

    def __init__(self):
        self.at, self.set_to = 0, None

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return list(batches(self.at))[-1]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = self.set_to = state["at"]


@pytest.mark.slow
def test_what_a_run_does_and_when(whole):
    seen, _, folder = whole
    assert list(seen.losses) == list(range(1, STEPS + 1))
    assert seen.calls == [
        ("start", 0),
        ("log", 1),
        ("log", 2),
        ("checkpoint", 3),
        ("log", 4),
        ("evaluation", 4),
        ("log", 6),
        ("checkpoint", 6),
        ("log", 8),
        ("evaluation", 8),
        ("checkpoint", 8),
        ("end", 8),
    ]
    with (folder / "training.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [1, 2, 4, 6, 8]
    for line in lines:
        assert float(line["loss"]) == pytest.approx(seen.losses[int(line["step"])], rel=1e-8)
    assert lines[0]["mfu"] == "nan"
    assert all(float(line["tokens_per_second"]) > 0 and float(line["mfu"]) > 0 for line in lines[1:])
    with (folder / "evaluation.csv").open() as file:
        (_, last) = csv.DictReader(file)
    assert float(last["perplexity"]) == pytest.approx(np.exp(float(last["loss"])), rel=1e-6)
    assert float(last["tokens"]) == 2 * 4 * (SEQ - 1)


@pytest.mark.slow
def test_the_trainer_makes_the_steps_of_make_step(whole):
    seen, made, _ = whole
    optimizer = train.adamw(1e-2)
    state = train.TrainState.init(model(), optimizer)
    step = train.make_step(optimizer, compute_dtype=None)
    for number, batch in enumerate(batches(STEPS), start=1):
        state, metrics = step(state, batch)
        assert float(metrics.loss) == seen.losses[number]
    for one, other in zip(arrays(made), arrays(state.unstacked()), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "source",
    [pytest.param(lambda: batches(STEPS), id="passed over", marks=pytest.mark.slow), pytest.param(Counted, id="set")],
)
def test_a_run_that_goes_on_makes_the_same_steps(whole, tmp_path, source):
    """To the bit: losses, and weights at the end."""
    expected, made, _ = whole
    seen = Losses()
    trainer(tmp_path, seen, At(5, stop), save_every=3).fit(model(), source(), steps=STEPS)
    assert list(seen.losses) == [1, 2, 3, 4, 5]
    again = source()
    found = trainer(tmp_path, seen, save_every=3).fit(model(), again, steps=STEPS)
    assert seen.calls[-1] == ("end", 8)
    assert ("start", 5) in seen.calls
    assert seen.losses == expected.losses
    for one, other in zip(arrays(found), arrays(made), strict=True):
        np.testing.assert_array_equal(one, other)
    if isinstance(again, Counted):
        assert again.set_to == 5
    # Figures of both parts are in one file, each step once.
    with (tmp_path / "training.csv").open() as file:
        assert [int(line["step"]) for line in csv.DictReader(file)] == [1, 2, 4, 5, 6, 8]


def test_a_run_that_is_done_makes_no_step(whole):
    _, made, folder = whole
    seen = Losses()
    found = trainer(folder, seen).fit(model(), batches(STEPS), steps=STEPS)
    assert seen.losses == {}
    for one, other in zip(arrays(found), arrays(made), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(arrays(trainer(folder).restore(model())), arrays(made), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("axes", "layout", "zero"),
    [("dp=2,tp=2", "hidden@tp vocab@tp batch@dp", 3), pytest.param("dp=4", "batch@dp", 1, marks=pytest.mark.long)],
)
@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(whole, tmp_path, axes, layout, zero):
    """The same to rounding: sums over devices are taken in another order. And back on one device."""
    expected, _, _ = whole
    seen = Losses()
    trainer(tmp_path, seen, At(3, stop)).fit(model(), batches(STEPS), steps=STEPS)
    trainer(tmp_path, seen, At(6, stop), zero=zero).fit(model(axes, layout), batches(STEPS), steps=STEPS)
    trainer(tmp_path, seen).fit(model(), batches(STEPS), steps=STEPS)
    # float32: a few roundings of 6e-8 a step, of losses near 3.5, which learning may double from step to step.
    np.testing.assert_allclose(list(seen.losses.values()), list(expected.losses.values()), rtol=2e-5)


@pytest.mark.parametrize(("number", "ended"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.slow
def test_a_signal_saves_and_ends(whole, tmp_path, number, ended):
    expected, _, _ = whole
    before = signal.getsignal(number)
    seen = Losses()
    run = trainer(tmp_path, seen, At(4, lambda run: os.kill(os.getpid(), number)))
    with pytest.raises(ended) as caught:
        run.fit(model(), batches(STEPS), steps=STEPS)
    if ended is SystemExit:
        assert caught.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert seen.calls[-2:] == [("checkpoint", 4), ("end", 4)]
    trainer(tmp_path, seen).fit(model(), batches(STEPS), steps=STEPS)
    assert seen.losses == expected.losses


@pytest.mark.slow
def test_tokens_a_second_are_those_of_all_steps_since_the_last_metrics(tmp_path, monkeypatch):
    """Without the time of evaluations and checkpoints, by a clock that the callbacks advance."""
    now, seen = [0.0], {}
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("mistral_eqx.train.trainer.time", clock)

    class Ticks(train.Callback):
        def on_step(self, run, metrics):
            now[0] += run.step

        def on_log(self, run, metrics):
            seen[run.step] = metrics["tokens_per_second"]

        def on_evaluation(self, run, metrics):
            now[0] += 100

        def on_checkpoint(self, run):
            now[0] += 100

    options = {"evaluate_on": list(batches(1, seed=1)), "evaluate_every": 2, "log_every": 4, "offload": "disk"}
    trainer(tmp_path, Ticks(), **options).fit(model(), batches(8), steps=8)
    tokens = 4 * (SEQ - 1)
    assert seen[4] == 3 * tokens / (2 + 3 + 4)
    assert seen[8] == 4 * tokens / (5 + 6 + 7 + 8)


def _first_model(alive):
    """Sends whether the given model is in memory after a step; this process has no type checks, which would keep it."""
    given = [model()]
    found = weakref.ref(given[0].norm.weight)
    look = At(1, lambda _: alive.send(found() is not None))
    trainer(None, look).fit(given.pop(), batches(1))


@pytest.mark.long
def test_a_run_does_not_keep_the_model_that_it_begins_with():
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_first_model, args=(there,))
    process.start()
    assert here.poll(120)
    assert not here.recv()
    process.join()


def test_without_a_folder_nothing_is_written(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, made, _ = whole
    found = trainer().fit(model(), batches(STEPS))
    assert list(tmp_path.iterdir()) == []
    for one, other in zip(arrays(found), arrays(made), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("axes", "layout", "zero"), [("dp=2,tp=2", "hidden@tp batch@dp", 3), (None, "", 0)])
@pytest.mark.slow
def test_an_evaluation_is_the_loss_without_learning(axes, layout, zero):
    """The first step's loss is that of the state before it."""
    optimizer = train.adamw(1e-2)
    state = train.TrainState.init(model(axes, layout), optimizer, zero=zero)
    (batch,) = batches(1)
    sums = train.make_evaluation(compute_dtype=None)(state, batch)
    _, metrics = train.make_step(optimizer, compute_dtype=None)(state, batch)
    # The same program but for the gradient, in float32.
    np.testing.assert_allclose(sums.cross_entropy / sums.weight, metrics.cross_entropy, rtol=1e-6)
    assert float(sums.correct / sums.weight) == float(metrics.accuracy)


@pytest.mark.slow
def test_bad_runs(whole, tmp_path):
    _, _, folder = whole
    with refused("no batches"):
        trainer().fit(model(), [], steps=3)
    with refused("ended after 2 of 3 steps"):
        trainer(tmp_path).fit(model(), batches(2), steps=3)
    with refused("evaluate on"):
        trainer(evaluate_on=[], evaluate_every=1).fit(model(), batches(1), steps=1)
    with refused("2 steps, and there are only 1 batches"):
        trainer(tmp_path).fit(model(), batches(1), steps=3)
    with refused("the config's vocab 32", "33"):
        other = mx.Mistral.init(dataclasses.replace(CONFIG, vocab=33), key=jr.key(0))
        trainer(folder).fit(other, batches(1), steps=9)
    with refused("checkpoint", "nothing", "optimizer"):
        mx.Trainer(optax.sgd(1e-2), checkpoint_dir=folder, progress=False).fit(model(), batches(1), steps=9)
    long = train.one_a_row([train.causal(np.zeros(8, np.int32))], CONFIG.max_positions + 1)
    with refused(f"{CONFIG.max_positions + 1} columns", "context"):
        trainer().fit(model(), [long], steps=1)
    with refused("the id 32", "32 entries"):
        trainer().fit(model(), [train.one_a_row([train.causal([1, 32])], 4)], steps=1)
    with refused("3 rows", "2"):
        three = train.one_a_row([train.causal([1, 2])] * 3, 4)
        trainer().fit(model("dp=2", "batch@dp"), [three], steps=1)
    with refused("save_every is 0"):
        trainer(save_every=0)
    with refused("has no checkpoint_dir"):
        trainer().restore(model())
    with refused("no checkpoint in", "missing"):
        trainer(tmp_path / "missing").restore(model())
