"""What is done beside training."""

import csv
import sys
import types

import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.trainer import At, Losses, batches, keep_programs as keep_programs, model, stop, trainer

from mistral_eqx import train
from mistral_eqx.train.callback import Run


def told(callback, losses, folder=None):
    """Tells a callback of evaluations until it stops the run; the number of them."""
    state = train.TrainState.init(model(), train.adamw(1e-2))
    run = Run(state, 0, None, folder)
    callback.on_start(run)
    for loss in losses:
        run.step += 1
        callback.on_evaluation(run, {"loss": loss})
        if run.stop:
            break
    return run


def test_a_run_stops_when_nothing_gets_better():
    assert told(train.EarlyStop(2), [3.0, 2.0, 2.5, 1.9, 2.0, 2.0, 1.0]).step == 6
    assert told(train.EarlyStop(2, by=0.5), [3.0, 2.0, 1.9, 1.8, 1.0]).step == 4
    # What was seen before the run was interrupted counts.
    first, second = train.EarlyStop(2), train.EarlyStop(2)
    told(first, [1.0, 2.0])
    second.set_state(first.get_state())
    assert told(second, [2.0, 0.5]).step == 1


@pytest.mark.slow
def test_the_best_model_is_kept(tmp_path):
    """Learning at far too high a rate makes the model worse; the best one is read again."""
    measured = {}

    class Kept(train.Callback):
        def on_evaluation(self, run, metrics):
            measured[metrics["loss"]] = np.asarray(run.model().norm.weight)

        def on_checkpoint(self, run):
            # A process that is killed now continues with this lowest loss, so its model must be complete.
            best = 1 + list(measured).index(min(measured))
            assert (tmp_path / "best" / str(best)).is_dir()

    options = {"evaluate_on": list(batches(1, seed=5)), "evaluate_every": 1, "save_every": 1}
    run = trainer(tmp_path, train.KeepBest(), Kept(), **options)
    last = run.fit(model(), batches(6), steps=6)
    best = run.restore(model(), best=True)
    np.testing.assert_array_equal(best.norm.weight, measured[min(measured)])
    assert min(measured) != list(measured)[-1]
    assert not np.array_equal(best.norm.weight, last.norm.weight)
    with refused("best model", "checkpoint_dir"):
        trainer(None, train.KeepBest()).fit(model(), batches(1), steps=1)


class Counted(train.Callback):
    """Counts steps, from whatever step on a run goes on."""

    def __init__(self):
        self.count = 0

    def on_step(self, run, metrics):
        self.count += 1

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


@pytest.mark.slow
def test_callbacks_go_on_whatever_stands_beside_them(tmp_path):
    first, second, third = Counted(), Counted(), Counted()
    trainer(tmp_path, first, At(2, stop)).fit(model(), batches(4), steps=4)
    trainer(tmp_path, Losses(), second, third, progress=True).fit(model(), batches(4), steps=4)
    assert (first.count, second.count, third.count) == (2, 4, 2)


def test_samples_are_shown(capsys):
    shown = []
    made = trainer(None, train.Samples(shown.append, every=2)).fit(model(), batches(5), steps=5)
    # Before the first step, after 2 and 4, and at the end; the steps after it do not change a model.
    norms = [float(model.norm.weight[0]) for model in shown]
    assert len(norms) == 4
    assert norms[0] == 1.0
    assert norms[-1] == float(made.norm.weight[0])


@pytest.mark.slow
def test_lines_behind_a_checkpoint_are_made_again(tmp_path):
    """What a process wrote that was killed before its next checkpoint, and a line that was cut off."""
    seen = Losses()
    trainer(tmp_path, seen, At(4, stop), log_every=1).fit(model(), batches(6), steps=6)
    with (tmp_path / "training.csv").open("a") as file:
        file.write("5,9,9,9,9,9,9,9\r\n6,9")
    trainer(tmp_path, seen, log_every=1).fit(model(), batches(6), steps=6)
    with (tmp_path / "training.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4, 5, 6]
    assert float(lines[4]["loss"]) == pytest.approx(seen.losses[5], rel=1e-8)


def test_a_table_with_fewer_columns_is_kept(tmp_path):
    """As of a run that began with an earlier version; then longer lines followed, which earlier versions wrote too."""
    path, old = tmp_path / "training.csv", "step,loss\n1,0.5\n2,0.4,7\n"
    for name, step in (("training.csv.foreign", 2), ("training.csv.foreign-2", 3)):
        path.write_text(old)
        table = train.CSV(tmp_path)
        run = object.__new__(Run)  # without a state, which takes a second
        run.step, run.folder = step, None
        table.on_start(run)
        with pytest.warns(UserWarning, match=rf"other columns; it is kept as .*{name}, and a new one begins"):
            table.on_log(run, {"loss": 0.3, "more": 1.0})
        run.step += 1
        table.on_log(run, {"loss": 0.2, "more": 2.0})
        assert (tmp_path / name).read_text() == old
        assert path.read_text() == f"step,loss,more\n{step},0.3,1\n{step + 1},0.2,2\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_tensorboard_gets_the_figures(tmp_path):
    from tensorboardX.proto import event_pb2

    seen = Losses()
    trainer(tmp_path, seen, train.TensorBoard(), log_every=1).fit(model(), batches(2), steps=2)
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = [event_pb2.Event.FromString(record) for record in _records(path)]
    found = {
        (value.tag, event.step): value.simple_value for event in events for value in event.summary.value if value.tag
    }
    assert found["training/loss", 2] == pytest.approx(seen.losses[2], rel=1e-6)
    with refused("TensorBoard", "checkpoint_dir"):
        trainer(None, train.TensorBoard()).fit(model(), batches(1), steps=1)


def _records(path):
    """TFRecord: a length in 8 bytes, 4 of checksum, the record, 4 of checksum."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        yield data[at + 12 : at + 12 + size]
        at += size + 16


@pytest.mark.slow
def test_wandb_gets_the_figures_and_the_run_goes_on(monkeypatch, tmp_path):
    """A stand-in that has wandb's three functions which are used."""
    logged, started = [], []

    class Stand:
        id = "abc"

        def log(self, figures, step):
            logged.append((step, figures))

        def finish(self):
            logged.append("finished")

    def init(**settings):
        started.append(settings)
        return Stand()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__=object()))
    seen = Losses()
    trainer(tmp_path, seen, train.WandB("p", mode="offline"), At(2, stop)).fit(model(), batches(4), steps=4)
    trainer(tmp_path, seen, train.WandB("p", mode="offline")).fit(model(), batches(4), steps=4)
    assert started == [
        {"resume": "allow", "project": "p", "mode": "offline"},
        {"resume": "allow", "project": "p", "mode": "offline", "id": "abc"},
    ]
    assert [entry[0] for entry in logged if entry != "finished"] == [1, 2, 4]
    assert logged[-1] == "finished"
    assert logged[0][1]["training/loss"] == pytest.approx(seen.losses[1])
