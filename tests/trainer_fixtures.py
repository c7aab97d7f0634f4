"""A run small enough for a test: a model, batches that are the same each time, and what a callback saw."""

import dataclasses

import jax
import jax.random as jr
import numpy as np
import pytest

import mistral_eqx as mx
from mistral_eqx import train


CONFIG = dataclasses.replace(mx.PRESETS["gpt-nano"], vocab=32, layers=1, windows=(None,), embed=16, hidden=32)
ROWS, SEQ = 4, 8


def batches(count, *, seed=0):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        yield train.one_a_row([train.causal(draw.integers(0, CONFIG.vocab, SEQ)) for _ in range(ROWS)], SEQ)


def host_batches(shard=(0, 1)):
    """One host's rows of batches without end."""
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab, (64, SEQ + 1))
    return train.batches(list(ids), rows=ROWS, seq=SEQ, shard=shard)


def model(axes=None, layout=""):
    made = mx.Mistral.init(CONFIG, key=jr.key(0))
    return made if axes is None else mx.shard(made, mx.make_mesh(axes), mx.Strategy(layout))


def trainer(folder=None, *callbacks, **options):
    settings = {"compute_dtype": None, "log_every": 2, "progress": False} | options
    return mx.Trainer(train.adamw(1e-2), checkpoint_dir=folder, callbacks=callbacks, **settings)


class Losses(train.Callback):
    """The loss of each step, and what was called when."""

    def __init__(self):
        self.losses = {}
        self.calls = []

    def on_start(self, run):
        self.calls.append(("start", run.step))

    def on_step(self, run, metrics):
        self.losses[run.step] = float(metrics.loss)

    def on_log(self, run, metrics):
        self.calls.append(("log", run.step))

    def on_evaluation(self, run, metrics):
        self.calls.append(("evaluation", run.step))

    def on_checkpoint(self, run):
        self.calls.append(("checkpoint", run.step))

    def on_end(self, run):
        self.calls.append(("end", run.step))


class At(train.Callback):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step(self, run, metrics):
        if run.step == self.step:
            self.act(run)


def stop(run):
    run.stop = True


@pytest.fixture(scope="module", autouse=True)
def keep_programs(tmp_path_factory):
    """Each run compiles its step; those of a file that are the same one are compiled once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [jax.config.values[name] for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("programs")), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
