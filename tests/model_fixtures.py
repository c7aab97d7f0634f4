"""Small models whose layers all matter, checkpoints with what transformers computes from them, and how to run both."""

import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file

from mistral_eqx.checkpoint import load
from mistral_eqx.config import MistralConfig
from mistral_eqx.nn import Cache, Mistral


MODELS = Path(__file__).parent / "fixtures" / "models"
VARIANTS = sorted(folder.name for folder in MODELS.iterdir())

# Logits in float32 are within this of the reference's, relative to the largest logit.
FLOAT32_TOLERANCE = 2e-5

# No two sizes are equal, so that no axis passes for another; all heads together are wider than the residual stream.
SMALL = MistralConfig(
    vocab=61,
    embed=24,
    hidden=40,
    layers=2,
    kv_heads=2,
    q_per_kv=3,
    head_dim=8,
    rope_theta=1e4,
    norm_eps=1e-5,
    max_positions=64,
    windows=(None, None),
)


def small_model(seed=0, *, config=SMALL, dtype=jnp.float32):
    """A random model in which attention picks some tokens out, and the norms' weights differ from one."""
    draw = np.random.default_rng(seed).standard_normal
    model = eqx.filter_eval_shape(Mistral.init, config, key=jr.key(0), dtype=dtype)

    def drawn(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        normal = draw(leaf.shape)
        return jnp.asarray(0.3 * normal if leaf.ndim > 1 else 1 + 0.2 * normal, leaf.dtype)

    return jax.tree.map(drawn, model)


@functools.lru_cache
def variant_model(variant, dtype="float32"):
    """The model of one of the recorded checkpoints."""
    return load(MODELS / variant, dtype=dtype)


@functools.lru_cache
def recorded(variant):
    """What transformers computes from it; see `fixtures/make_models.py`."""
    return load_file(MODELS / variant / "recorded.safetensors")


def prompt(variant, length):
    """A recorded prompt as a batch of one row."""
    return recorded(variant)[f"ids_{length}"][None]


@eqx.filter_jit
def _run(model, ids, positions, cache):
    hidden, cache = model.hidden(ids, positions, cache)
    return model.logits(hidden), cache


def run(model, ids, positions=None, cache=None):
    """Logits at every position, and the cache.

    The logits are numpy's: what a test does with them is not worth compiling.
    """
    logits, cache = _run(model, jnp.asarray(ids), None if positions is None else jnp.asarray(positions), cache)
    return np.asarray(logits), cache


def run_in_pieces(model, ids, pieces, cache):
    """Logits at every position, of ids that are read into a cache piece by piece, and the cache."""
    logits, ids = [], np.asarray(ids)
    for start, stop in zip(np.cumsum([0, *pieces[:-1]]), np.cumsum(pieces), strict=True):
        piece, cache = run(model, ids[:, start:stop], None, cache)
        logits.append(piece)
    return np.concatenate(logits, axis=1), cache


def empty_cache(model, batch, kv_seq):
    return Cache.init(model.config, batch, kv_seq, model.dtype)


def relative_error(found, expected):
    """The largest difference, relative to the largest number expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return np.abs(found - expected).max() / np.abs(expected).max()


def padded(rows, width, side):
    """Ids and positions of rows of several lengths, with padding on the `"left"` or `"right"`."""
    ids, positions = np.zeros((len(rows), width), np.int32), np.full((len(rows), width), -1, np.int32)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[index, columns], positions[index, columns] = row, np.arange(len(row))
    return ids, positions


def both_sides(rows, width):
    """The rows twice: padded on the left, then padded on the right."""
    sides = [padded(rows, width, side) for side in ("left", "right")]
    return tuple(np.concatenate(arrays) for arrays in zip(*sides, strict=True))


def skip_without_import_hook(request):
    """Skips a test of the types at the door in a session that does not check them."""
    if not request.config.getoption("jaxtyping_packages"):
        pytest.skip("The import hook of jaxtyping is off.")
