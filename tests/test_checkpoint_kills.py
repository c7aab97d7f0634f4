"""A process that is killed while it replaces a checkpoint leaves the old one or the new one, whole.

The slow suite kills a few times; `KILLS=40 pytest -m slow -s tests/test_checkpoint_kills.py` as often as that.
"""

import itertools
import multiprocessing
import os
import random
import signal
import time

import jax
import jax.random as jr
import pytest
from fixtures.checkpoint import random_model, tiny
from fixtures.cli import run

from mistral_eqx.checkpoint import convert, load, open_checkpoint, save


KILLS = int(os.environ.get("KILLS", "10"))


def tensors(path):
    """All that a checkpoint holds, bit for bit."""
    return {name: tensor[...].tobytes() for name, tensor in open_checkpoint(path).tensors.items()}


def _convert(folder, begun):
    """What a process does until it is killed: two checkpoints take turns under one name."""
    for name, format in itertools.cycle((("first", "hf"), ("second", "mistral"))):
        convert(folder / name, folder / "out", format=format, overwrite=True, max_shard_size="20KB")
        begun.set()


def _save(folder, begun):
    jax.config.update("jax_platforms", "cpu")
    models = [(load(folder / name), format) for name, format in (("first", "hf"), ("second", "mistral"))]
    for model, format in itertools.cycle(models):
        save(model, folder / "out", format=format, overwrite=True, max_shard_size="20KB")
        begun.set()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills of Unix")
@pytest.mark.parametrize("write", [_convert, _save])
def test_a_kill_at_any_moment_leaves_one_or_the_other(tmp_path, write):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mistral_eqx.public", "fixtures.checkpoint"])
    known = {}
    for number, (name, format) in enumerate((("first", "hf"), ("second", "mistral"))):
        save(random_model(tiny(), jr.key(number)), tmp_path / name, format="hf")
        convert(tmp_path / name, tmp_path / "out", format=format, overwrite=True, max_shard_size="20KB")
        known[name] = tensors(tmp_path / "out")
    assert known["first"] != known["second"]
    draw, left, seen = random.Random(), 0, []
    for _ in range(KILLS):
        begun = context.Event()
        process = context.Process(target=write, args=(tmp_path, begun))
        process.start()
        assert begun.wait(120)
        time.sleep(draw.random() * 0.3)
        assert process.is_alive()
        process.kill()
        process.join()
        found = tensors(tmp_path / "out")
        seen += [name for name, expected in known.items() if found == expected]
        load(tmp_path / "out")
        left += any(path.name.startswith(".out.") for path in tmp_path.iterdir())
    assert len(seen) == KILLS
    assert run("convert", tmp_path / "first", tmp_path / "out", "--overwrite").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out", "second"]
    print(  # noqa: T201
        f"{KILLS} kills: {seen.count('first')} times the first checkpoint, {seen.count('second')} times the second, "
        f"whole; {left} left a hidden folder, and the next run none"
    )
