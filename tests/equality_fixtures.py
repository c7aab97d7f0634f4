"""Random models and strategies that fit them, and how far results on many devices are from those on one."""

import dataclasses
import math
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from model_fixtures import SMALL, small_model
from sharding_fixtures import MESHES, free_strategy

import mistral_eqx as mx
from mistral_eqx.parallel.mesh import make_mesh


# How many pairs of a model and a strategy the long run compares; the default suite compares a few.
LONG_RUN = int(os.environ.get("EQUALITY_PAIRS", "0"))
# One model on one device is compared with so many strategies.
STRATEGIES = 3

# In units of the rounding error that one number can have: see `rounding`.
ROUNDINGS = 32
FLOAT64_BOUND = 1e-12


def thorough(pairs, *, part):
    """Settings for `pairs` comparisons in the default suite, and this part of those of a long run.

    The default suite draws the same ones each time, the long run others. What fails is small already: compiling it in
    ever smaller versions would take longer than reading it.
    """
    return settings(
        max_examples=math.ceil((part * LONG_RUN or pairs) / STRATEGIES),
        derandomize=not LONG_RUN,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def any_config(random):
    """A small model of any shape. `vocab` and `hidden` can be split in many ways, `embed` in some."""
    layers = random.randint(1, 2)
    window = random.randint(1, 5)
    return dataclasses.replace(
        SMALL,
        vocab=random.choice([42, 48, 96]),
        embed=random.choice([8, 12, 21]),
        hidden=random.choice([24, 42, 48]),
        layers=layers,
        kv_heads=random.choice([1, 2, 3, 4, 8]),
        q_per_kv=random.choice([1, 3, 4, 7]),
        head_dim=random.choice([8, 16, 64]),
        windows=random.choice([(None, None), (window, window), (None, window)])[-layers:],
        tied=random.random() < 0.5,
    )


def any_strategies(random, config, batch):
    """With which strategies one model is compared: a name, the strategy, and the mesh's axes."""
    named = [
        (choice.name.split(",")[0], choice.strategy, choice.axes)
        for devices in (2, 3, 4, 6, 8)
        for choice in mx.strategies(config, devices)
        if batch % choice.axes.get("dp", 1) == 0
    ]
    # Each name as often as any other, on however few meshes it is legal.
    names = sorted({name for name, _, _ in named})
    names = random.sample(names, min(len(names), 1 + STRATEGIES // 2))
    found = [random.choice([one for one in named if one[0] == name]) for name in names]
    while len(found) < STRATEGIES:
        axes = random.choice(MESHES)
        found.append(("free", free_strategy(random, config, axes, batch), axes))
    return found


def forget_programs():
    """Gives back the memory of the compiled programs, of which a long run has thousands."""
    if LONG_RUN:
        jax.clear_caches()


def random_model(config, dtype):
    """A random model all of whose numbers are `dtype`; call it, and use it, inside `precision(dtype)`."""
    model = small_model(config=config)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, model)


def precision(dtype):
    """In which numbers of this kind exist."""
    return jax.enable_x64(jnp.dtype(dtype).itemsize == 8)


def on(model, strategy, axes):
    return mx.shard(model, make_mesh(axes), strategy)


@eqx.filter_jit
def logits_and_gradients(model, ids, targets):
    """Logits, and the gradient of the cross-entropy of `targets` with respect to every weight: one program."""

    def loss(model):
        logits = model(ids)
        likelihoods = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=2)
        return -jnp.mean(likelihoods), logits

    (_, logits), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return logits, gradients


def arrays(tree):
    """The arrays of a module by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def worst_error(found, expected):
    """The largest difference of two modules' arrays, relative to the largest number of that array.

    An array that is zero but for rounding, such as the gradient of queries that see one key only, is compared with the
    largest number of all arrays.
    """
    found, expected = arrays(found), arrays(expected)
    assert found.keys() == expected.keys()
    largest = max(np.abs(array).max() for array in expected.values())
    errors = {}
    for name, array in expected.items():
        assert np.isfinite(found[name]).all(), name
        own = np.abs(array).max()
        errors[name] = np.abs(found[name] - array).max() / (own if own > 1e-5 * largest else largest)
    return max(errors.values())


def rounding(config, seq, dtype):
    """How much a logit may be off because its sums are taken in another order.

    Each of `n` additions rounds by up to half of `eps`, up or down as if by chance: a sum of `n` products is off by
    about `eps / 2 * sqrt(n)` of its size, and what follows each other adds up likewise. So `n` counts the products on
    the way from an embedding to a logit. How much the layers in between enlarge an error (the softmax by the size of
    its scores, a norm of few entries) is not derived: `ROUNDINGS` is for that, and for the way back of gradients.
    """
    heads = config.q_heads * config.head_dim
    layer = config.embed + config.head_dim + seq + heads + config.embed + config.hidden
    return float(jnp.finfo(dtype).eps) / 2 * math.sqrt(config.layers * layer + config.embed)


class Tally:
    """Counts what was compared, and says it at the end of the session."""

    def __init__(self):
        self.pairs, self.kinds, self.worst = {}, {}, {}

    def add(self, what, kind, config, strategy, axes, **errors):
        self.pairs.setdefault(what, set()).add((config, strategy, tuple(axes.items())))
        self.kinds.setdefault(what, {}).setdefault(kind, 0)
        self.kinds[what][kind] += 1
        for name, error in errors.items():
            self.worst[what, name] = max(error, self.worst.get((what, name), 0.0))

    def pytest_terminal_summary(self, terminalreporter):
        for what, pairs in self.pairs.items():
            worst = [f"{name} {error:.2g}" for (of, name), error in self.worst.items() if of == what]
            worst = f"worst error: {', '.join(worst)}" if worst else "all tokens equal"
            kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.kinds[what].items()))
            terminalreporter.write_line(f"equality, {what}: {len(pairs)} pairs ({kinds}), {worst}")


TALLY = Tally()
