"""Some inputs of `python tests/fuzz`: the first seeds, and those that once ended in a fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


FUZZ = Path(__file__).with_name("fuzz")
# Each was a traceback, a hang, a wrong result or a sentence that names nothing.
FAILED = {
    "gguf-pieces": (1,),
    "config": (1,),
    "sentencepiece": (2, 4),
    "tokenizer-config": (5,),
    "generation-config": (5, 6, 7),
}


def _run(*arguments):
    # A process of its own: children are forked there, which no device of JAX survives.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, FUZZ, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_first_seeds_of_each_target():
    assert "0 faults" in _run("--seeds", 0, 1)


@pytest.mark.slow
def test_seeds_that_failed_once():
    seeds = sorted({seed for failed in FAILED.values() for seed in failed})
    assert "0 faults" in _run("--targets", *FAILED, "--seeds", *seeds)
