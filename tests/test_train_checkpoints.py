"""A checkpoint is complete or not there."""

import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.trainer import batches, keep_programs as keep_programs, model, trainer

from mistral_eqx import train


def state_at(steps):
    state = train.TrainState.init(model(), train.adamw(1e-2))
    return eqx.tree_at(lambda state: state.steps, state, jnp.asarray(steps, jnp.int32))


@pytest.mark.slow
def test_the_newest_are_kept(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, {"model": [1, 2]}, keep=2)
    for steps in (1, 2, 3):
        checkpoints.save(state_at(steps), {"steps": steps})
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert checkpoints.latest == 3
    found, more = checkpoints.restore(state_at(0))
    assert (int(found.steps), more) == (3, {"steps": 3})
    checkpoints.close()
    other = train.Checkpoints(tmp_path, {"model": [1, 3]})
    with refused("model [1, 2]", "[1, 3]", "folder"):
        other.restore(state_at(0))
    other.close()
    with refused("no checkpoint in"):
        train.Checkpoints(tmp_path / "other", {}).restore(state_at(0))
    with refused("keep 0"):
        train.Checkpoints(tmp_path, {}, keep=0)


def _remove(folder):
    shutil.rmtree(folder / "state")


def _empty(folder):
    for file in [*folder.rglob("*")]:
        if file.is_file():
            file.write_bytes(b"")


def _cut(folder):
    largest = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def _garble(folder):
    for file in (folder / "about").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\xff{")


@pytest.mark.parametrize("damage", [_remove, _empty, _cut, _garble])
# Reads that orbax has begun when it finds the damage complain later that nobody waits for them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_a_damaged_checkpoint_yields_to_the_one_before(tmp_path, damage):
    checkpoints = train.Checkpoints(tmp_path, {}, keep=2)
    for steps in (1, 2):
        checkpoints.save(state_at(steps), {"steps": steps})
    checkpoints.wait()
    checkpoints.close()
    damage(tmp_path / "2")
    again = train.Checkpoints(tmp_path, {}, keep=2)
    with pytest.warns(UserWarning, match=r"The checkpoint of step 2 in .* is damaged .* the one before it is used\."):
        found, more = again.restore(state_at(0))
    assert (int(found.steps), more) == (1, {"steps": 1})
    # It is not tried again, and a new one takes its place.
    assert again.latest == 1
    again.save(state_at(2), {"steps": 2})
    again.wait()
    assert int(again.restore(state_at(0))[0].steps) == 2
    again.close()
    assert len(list(tmp_path.glob("damaged-2-*"))) == 1
    gc.collect()


def test_a_run_of_damaged_checkpoints_is_refused(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, {})
    checkpoints.save(state_at(1), {})
    checkpoints.wait()
    checkpoints.close()
    _empty(tmp_path / "1")
    with refused("step 1", "is damaged", "delete the folder"):
        train.Checkpoints(tmp_path, {}).restore(state_at(0))


@pytest.mark.slow
def test_a_state_may_change_while_it_is_written(tmp_path):
    """A step takes the memory of the state that is on its way to the disk."""
    optimizer = train.adamw(1e-2)
    state = train.TrainState.init(model(), optimizer)
    step = train.make_step(optimizer, compute_dtype=None)
    checkpoints = train.Checkpoints(tmp_path, {})
    kept = {}
    for batch in batches(6):
        state, _ = step(state, batch)
        kept[int(state.steps)] = [np.array(leaf) for leaf in jax.tree.leaves(state.model.pattern)]
        checkpoints.save(state, {})
    checkpoints.wait()
    found, _ = checkpoints.restore(train.TrainState.init(model(), optimizer))
    for one, other in zip(jax.tree.leaves(found.model.pattern), kept[6], strict=True):
        np.testing.assert_array_equal(one, other)
    checkpoints.close()


def _fill(folder, said):
    """What the process does that may not write large files: it gets what a full disk gives, an error while writing."""
    checkpoints = train.Checkpoints(folder, {})
    checkpoints.save(state_at(1), {})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        checkpoints.save(state_at(2), {})
        checkpoints.wait()
    except ValueError as error:
        said.send(str(error))


@pytest.mark.slow
def test_a_full_disk_leaves_the_one_before(tmp_path):
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_fill, args=(tmp_path, there))
    process.start()
    assert here.poll(120)
    said = here.recv()
    process.kill()
    assert said.startswith(f"A checkpoint could not be written to {tmp_path}: ")
    assert said.endswith("The one of step 1 is complete; free space or repair the folder, and run the training again.")
    assert len(said) < 400
    again = train.Checkpoints(tmp_path, {})
    assert again.latest == 1
    found, _ = again.restore(state_at(0))
    assert int(found.steps) == 1
    again.close()


STEPS = 40
# `KILLS=20 pytest -m slow -s tests/test_train_checkpoints.py` kills more often.
KILLS = int(os.environ.get("KILLS", "8"))


def _train(folder, losses):
    """What the process does that is killed: a checkpoint after each step."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    class Told(train.Callback):
        def on_step(self, run, metrics):
            with open(losses, "a") as file:
                file.write(json.dumps([run.step, float(metrics.loss)]) + "\n")

    trainer(folder, Told(), save_every=1, log_every=100).fit(model(), batches(STEPS), steps=STEPS)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_leaves_a_checkpoint(tmp_path):
    """`KILLS` times: what is there can be read, and training goes on to the losses of a run that was never killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mistral_eqx.public", "orbax.checkpoint", "fixtures.trainer"])
    whole, losses = tmp_path / "whole.jsonl", tmp_path / "losses.jsonl"
    undisturbed = context.Process(target=_train, args=(tmp_path / "whole", whole))
    undisturbed.start()
    undisturbed.join()
    assert undisturbed.exitcode == 0
    draw, kills, reached = random.Random(0), 0, []
    while kills < KILLS:
        before = losses.read_text().count("\n") if losses.exists() else 0
        process = context.Process(target=_train, args=(tmp_path / "run", losses))
        process.start()
        # From the first step of this process on, for as long as some steps take.
        while process.is_alive() and (not losses.exists() or losses.read_text().count("\n") == before):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.2)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
        reached.append(losses.read_text().count("\n"))
    last = context.Process(target=_train, args=(tmp_path / "run", losses))
    last.start()
    last.join()
    assert last.exitcode == 0
    expected = dict(json.loads(line) for line in whole.read_text().splitlines())
    found = [json.loads(line) for line in losses.read_text().splitlines() if line.endswith("]")]
    assert kills == KILLS
    assert {step for step, _ in found} == set(expected)
    for step, loss in found:
        assert loss == expected[step]
    print(f"killed {kills} times, after {reached} steps in all; {len(found)} steps made for {STEPS}")  # noqa: T201
