"""A run that goes on with other values than it began with, and beside files that are not its own."""

import contextlib
import shutil
import warnings

import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.trainer import CONFIG, SEQ, Losses, keep_programs as keep_programs, model, trainer

from mistral_eqx import train


IDS = list(np.random.default_rng(0).integers(0, CONFIG.vocab, (32, SEQ + 1)))


def made(ids=IDS, **options):
    return train.batches(ids, **{"rows": 4, "seq": SEQ, **options})


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    trainer(folder).fit(model(), made(), steps=2)
    return folder


@pytest.fixture
def begun(first, tmp_path):
    return shutil.copytree(first, tmp_path / "run")


@pytest.mark.parametrize(
    ("ids", "options", "word"),
    [
        (IDS, {"rows": 8}, "rows 4, now 8"),
        (IDS, {"seq": 2 * SEQ}, "seq 8, now 16"),
        (IDS, {"seed": 1}, "seed 0, now 1"),
        (IDS, {"packing": True}, "packing False, now True"),
        (IDS[:16], {}, "number of examples 32, now 16"),
        ([*IDS[:-1], IDS[0]], {}, "examples"),
        (IDS, {"objective": lambda ids, random: train.causal(ids[::-1])}, "examples"),
    ],
)
@pytest.mark.slow
def test_other_batches_are_refused(begun, ids, options, word):
    with refused("began with other values", word, "--allow-changes"):
        trainer(begun).fit(model(), made(ids, **options), steps=4)


@pytest.mark.parametrize("options", [{"seed": 1}, {"packing": True}])
@pytest.mark.slow
def test_other_batches_may_be_allowed(begun, options):
    losses = Losses()
    with pytest.warns(UserWarning, match=r"continues with other values: .*the batches start at the first one\."):
        trainer(begun, losses, allow_changes=True).fit(model(), made(**options), steps=4)
    assert sorted(losses.losses) == [3, 4]
    # From there on these are the run's own.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(begun).fit(model(), made(**options), steps=5)


@pytest.mark.parametrize("changed", [{"seed": 3}, {"accumulate": 2}])
def test_other_settings_of_the_trainer_are_refused(begun, changed):
    with refused("began with other values", next(iter(changed))):
        trainer(begun, **changed).fit(model(), made(), steps=4)


def test_the_same_batches_go_on_without_a_word(begun):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(begun, log_every=1).fit(model(), made(), steps=4)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00", b"step,loss\nx,y\n"])
@pytest.mark.slow
def test_a_table_of_somebody_else_never_costs_the_training(tmp_path, content):
    (tmp_path / "training.csv").write_bytes(content)
    kept = pytest.warns(UserWarning, match="training.csv.foreign") if content else contextlib.nullcontext()
    with kept:
        trainer(tmp_path).fit(model(), made(), steps=2)
    lines = (tmp_path / "training.csv").read_text().splitlines()
    assert lines[0].startswith("step,")
    assert lines[-1].startswith("2,")
    aside = tmp_path / "training.csv.foreign"
    assert (aside.read_bytes() if content else b"") == content


def test_figures_that_cannot_be_written_never_cost_the_training(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "training.csv").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=r"Metrics of step \d are lost: .*training\.csv: No space left on device\."):
        trained = trainer(tmp_path / "run", train.CSV(tmp_path / "figures")).fit(model(), made(), steps=2)
    assert trained is not None
    assert (tmp_path / "run" / "2").is_dir()
