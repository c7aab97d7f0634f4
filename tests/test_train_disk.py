"""Steps whose master weights and optimizer state are files: equal to those in memory, in less memory, and safe."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures import trainer as runs
from fixtures.generation import refused
from fixtures.model import small_model
from test_train_zero import CONFIG, batch

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.train import disk


OPTIMIZER = train.adamw(train.warmup_cosine(1e-2, warmup=1, steps=9))
# Two blocks in the layer pattern.
WINDOWS = dataclasses.replace(CONFIG, windows=(None, 5) * 2)


def in_memory(model, steps, **options):
    state, step = train.TrainState.init(model, OPTIMIZER), train.make_step(OPTIMIZER, **options)
    losses = []
    for number in range(steps):
        state, metrics = step(state, batch(number))
        losses.append(metrics.loss)
    return state, losses


def run(step, model, steps, state=None):
    """The state and the losses after so many steps, of which the files may have some already."""
    state, losses = step.init(model, dtype=jnp.float32) if state is None else state, []
    for number in range(int(state.steps), steps):
        state, metrics = step(state, batch(number))
        losses.append(metrics.loss)
    return state, losses


def weights(state):
    return jax.tree.leaves(eqx.filter(state.model, train.trained(state.model)))


def assert_equal(found, expected):
    for one, other in zip(weights(found), weights(expected), strict=True):
        np.testing.assert_array_equal(one, other.astype(one.dtype))


@pytest.mark.slow
def test_a_killed_process_continues_and_its_steps_are_those_in_memory(tmp_path, monkeypatch):
    """Bit for bit, with clipping, weight decay and a schedule."""
    model, write, written = small_model(config=CONFIG), disk._write, []
    expected, losses = in_memory(model, 3, remat="none")

    def killed(file, tree):
        write(file, tree)
        written.append(file)
        # Each step writes five files, as does the start: this is in the second step.
        if len(written) == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(disk, "_write", killed)
    step = train.DiskStep(OPTIMIZER, tmp_path, remat="none")
    with pytest.raises(KeyboardInterrupt):
        run(step, model, 3)
    found, others = run(step, model, 3)
    np.testing.assert_array_equal(others, losses[1:])
    assert_equal(found, expected)
    # A step that is not finite writes no weights.
    files = {file: file.read_bytes() for file in tmp_path.glob("*.?")}
    broken = batch(3)
    _, metrics = step(found, dataclasses.replace(broken, weights=broken.weights * np.nan))
    assert not bool(metrics.finite)
    assert {file: file.read_bytes() for file in tmp_path.glob("*.?")} == files
    state = step.init(model, dtype=jnp.float32)
    assert (int(state.steps), int(state.skipped)) == (4, 1)
    assert_equal(state, expected)


@pytest.mark.slow
def test_adapters_alone_are_trained_and_stored(tmp_path):
    """With a layer pattern, in two accumulated parts."""
    model = mx.apply_lora(small_model(config=WINDOWS), rank=2, alpha=4.0, key=jr.key(0))
    found = run(train.DiskStep(OPTIMIZER, tmp_path, accumulate=2), model, 2)
    expected = in_memory(model, 2, accumulate=2)
    np.testing.assert_array_equal(found[1], expected[1])
    assert_equal(found[0], expected[0])
    stored = sum(file.stat().st_size for file in tmp_path.glob("block-*"))
    numbers = sum(leaf.size for leaf in weights(found[0]))
    # Master weights and two moments in float32, twice. Each block has two more numbers, its counts of steps.
    counts = 2 * CONFIG.layers
    assert stored == 2 * 4 * (3 * numbers + counts)


@pytest.mark.slow
def test_in_bfloat16_memory_has_weights_gradients_and_a_few_blocks(tmp_path, monkeypatch):
    """The master weights are those of float32: without clipping, whose norm would be that of rounded gradients."""
    config = dataclasses.replace(CONFIG, layers=16, windows=(None,) * 16)
    model = small_model(config=config)
    expected, losses = in_memory(model, 2, clip=None)
    write, most = disk._write, []

    def watched(file, tree):
        most.append(sum(leaf.nbytes for leaf in jax.live_arrays()))
        write(file, tree)

    step = train.DiskStep(OPTIMIZER, tmp_path, clip=None)
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    state = step.init(model, dtype=jnp.bfloat16)
    monkeypatch.setattr(disk, "_write", watched)
    found, others = run(step, model, 2, state)
    del state
    np.testing.assert_array_equal(others, losses)
    assert_equal(found, expected)
    assert {leaf.dtype for leaf in weights(found)} == {jnp.dtype("bfloat16")}
    size = sum(leaf.nbytes for leaf in weights(found))
    block = max(file.stat().st_size for file in tmp_path.glob("*.0"))
    assert len(most) == 2 * 17
    assert max(most) - before <= 2 * size + 4 * block
    # In memory, master weights and moments take six times as much as weights in bfloat16.
    assert 2 * size + 4 * block < 6 * size


def test_what_cannot_be_trained_is_refused_in_one_sentence(tmp_path):
    model = small_model(config=CONFIG)
    step = train.DiskStep(OPTIMIZER, tmp_path)
    with pytest.raises(ValueError, match="on a mesh, and a DiskStep trains on one device; leave the mesh out"):
        step.init(mx.shard(model, mx.make_mesh("tp=2"), mx.HEADS))
    with pytest.raises(ValueError, match="make the state with its init"):
        step(train.TrainState.init(model, OPTIMIZER), batch(0))
    state = step.init(model)
    step.mark(eqx.tree_at(lambda state: state.steps, state, jnp.asarray(7, jnp.int32)))
    (tmp_path / "about.json.new").symlink_to("/dev/full")
    with refused(f"written to {tmp_path}: [Errno 28] No space left on device. The one of step 7 is complete; free"):
        step.mark(state)
    with pytest.raises(ValueError, match="those of another model or optimizer; take the same ones"):
        step.init(small_model(config=WINDOWS))
    marker = tmp_path / "about.json"
    assert json.loads(marker.read_text())["steps"] == 7
    os.truncate(tmp_path / "outer.0", 100)
    with refused("outer.0 has 100 bytes in place of", "damaged"):
        step.init(model)
    os.truncate(marker, 10)
    with refused("about.json is not JSON", "damaged"):
        step.init(model)


@pytest.mark.slow
def test_a_run_continues_when_a_full_disk_has_room_again(tmp_path):
    file = tmp_path / "disk" / "outer.1"

    def fill(_):
        file.unlink()
        file.symlink_to("/dev/full")

    start = tmp_path / "disk" / "outer.0"
    start.parent.mkdir()
    start.symlink_to("/dev/full")
    with refused(f"written to {start.parent}: [Errno 28] No space left on device. None is complete yet; free space"):
        runs.trainer(tmp_path, offload="disk").fit(runs.model(), runs.batches(3))
    start.unlink()
    # A run that ended before its first step may begin again in another way.
    (tmp_path / "other" / "disk").mkdir(parents=True)
    (tmp_path / "other" / "disk" / "about.json").write_text('{"steps": 0}')
    runs.trainer(tmp_path / "other").fit(runs.model(), runs.batches(1))
    with refused("No space left on device. The one of step 2 is complete"):
        runs.trainer(tmp_path, runs.At(2, fill), offload="disk").fit(runs.model(), runs.batches(3))
    file.unlink()
    seen = runs.Losses()
    runs.trainer(tmp_path, seen, offload="disk").fit(runs.model(), runs.batches(3))
    assert list(seen.losses) == [3]


def test_several_processes_are_refused_before_they_write(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with refused("are for one process, and there are 2", "zero=3"):
        runs.trainer(tmp_path / "run", offload="disk").fit(None, [])
    assert list(tmp_path.iterdir()) == []


def test_a_trainer_that_cannot_keep_its_state_on_disk_is_refused(tmp_path):
    with refused("offload is 'disk'", "give it a checkpoint_dir"):
        runs.trainer(offload="disk")
    with refused("offload is 'disk'", "zero=3", "leave one of them out"):
        runs.trainer(tmp_path, offload="disk", zero=3)
    with refused("offload is 'disc'"):
        runs.trainer(tmp_path, offload="disc")
    (tmp_path / "7").mkdir()
    with refused("has checkpoints, from which offload='disk' cannot continue"):
        runs.trainer(tmp_path, offload="disk").fit(runs.model(), runs.batches(1))
    with refused("There is no checkpoint in"):
        runs.trainer(tmp_path, offload="disk").restore(runs.model())
    marker = tmp_path / "run" / "disk" / "about.json"
    marker.parent.mkdir(parents=True)
    marker.write_text('{"steps": 0}')
    with refused("There is no checkpoint in"):
        runs.trainer(tmp_path / "run", offload="disk").restore(None)
    assert [*(tmp_path / "run").rglob("*")] == [marker.parent, marker]
    marker.write_text('{"steps": 1}')
    (tmp_path / "run" / "best").mkdir()
    with refused("keeps its state in files of offload='disk'; continue with it"):
        runs.trainer(tmp_path / "run").restore(None, best=True)


STEPS = 5


@pytest.mark.slow
def test_a_trainer_continues_from_files(tmp_path):
    """Its losses, its evaluations and its model are those of a trainer in memory, bit for bit."""
    options = {"evaluate_every": 2, "evaluate_on": list(runs.batches(1, seed=1))}
    seen, others = runs.Losses(), runs.Losses()
    expected = runs.trainer(None, others, **options).fit(runs.model(), runs.batches(STEPS), steps=STEPS)
    options |= {"offload": "disk"}
    for callbacks in ([runs.At(3, runs.stop)], []):
        run = runs.trainer(tmp_path, seen, train.KeepBest(), *callbacks, **options)
        found = run.fit(runs.model(), runs.batches(STEPS), steps=STEPS)
    assert seen.losses == others.losses
    assert ("start", 3) in seen.calls
    for model in (found, run.restore(runs.model())):
        for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)
    run.restore(runs.model(), best=True)
    with refused("keeps its state in files of offload='disk'; continue with it"):
        runs.trainer(tmp_path).fit(runs.model(), runs.batches(STEPS))
    with refused("belongs to a run with the config's rope"):
        config = dataclasses.replace(runs.CONFIG, rope_theta=5.0)
        run.fit(mx.Mistral.init(config, key=jr.key(0)), runs.batches(STEPS))


def _killed(folder, losses, at):
    """What a process does that is killed when it has written half of a file: the file number `at`."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    write, numbers = disk._write, itertools.count(1)

    def half(file, tree):
        write(file, tree)
        if next(numbers) == at:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    class Told(train.Callback):
        def on_step(self, run, metrics):
            with open(losses, "a") as file:
                file.write(json.dumps([run.step, float(metrics.loss)]) + "\n")

    disk._write = half
    runs.trainer(folder, Told(), offload="disk").fit(runs.model(), runs.batches(STEPS), steps=STEPS)


@pytest.mark.slow
def test_a_process_that_is_killed_in_the_middle_of_a_file_continues(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mistral_eqx.public", "fixtures.trainer"])
    losses, codes = tmp_path / "losses.jsonl", []
    # Two files in the beginning, and two in each step: at the beginning, in the third step, in the next one, never.
    for at in (2, 8, 2, 0):
        process = context.Process(target=_killed, args=(tmp_path / "run", losses, at))
        process.start()
        process.join()
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL] * 3 + [0]
    seen = runs.Losses()
    runs.trainer(None, seen).fit(runs.model(), runs.batches(STEPS), steps=STEPS)
    assert [tuple(json.loads(line)) for line in losses.read_text().splitlines()] == list(seen.losses.items())
