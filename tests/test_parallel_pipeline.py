"""Pipeline parallelism: blocks in stages, through which micro-batches pass."""

import dataclasses
import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fixtures.equality import FLOAT64_BOUND, precision, random_model, worst_error
from fixtures.generation import refused
from fixtures.latent import LATENT
from fixtures.lora import LINEAR
from fixtures.model import SMALL, small_model
from fixtures.sharding import exchanges
from jax.sharding import AbstractMesh
from test_parallel_communication import CONFIG as COUNTED, _counted

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.nn import in_stages, stack, unstack
from mistral_eqx.parallel import with_auto_axes, with_strategy
from mistral_eqx.planning import Training, communication, training_step


CONFIG = dataclasses.replace(SMALL, vocab=64, layers=4, windows=(3, None) * 2)
# A program of half the size.
PLAIN = dataclasses.replace(CONFIG, layers=2, windows=(None, None))
CONFIG4 = dataclasses.replace(CONFIG, windows=(None,) * 4)
DEEP = dataclasses.replace(CONFIG, layers=8, windows=(3, None) * 4)
ROWS, SEQ = 8, 16
ONE_BY_ONE = {"schedule": "1f1b"}
THREE = ("layers@pp batch@dp kv_heads@tp hidden@tp vocab@tp", {"pp": 2, "dp": 2, "tp": 2})


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def _long(*case):
    return pytest.param(*case, marks=pytest.mark.long)


def _staged(model, layout, axes, chunks=1):
    return mx.shard(stack(model, chunks), mx.make_mesh(axes), mx.Strategy(layout))


def _batch(seed):
    """Packed documents, causal and with a prefix; rows count unequally and have padding."""
    draw, examples = np.random.default_rng(seed), []
    for _ in range(2 * ROWS):
        ids = draw.integers(0, CONFIG.vocab, draw.integers(6, 16))
        examples += [train.causal(ids), train.prefix_lm(ids, 4)]
    return jax.tree.map(lambda leaf: leaf[:ROWS], train.pack(examples, SEQ))


def _gradient(model, *, zero=0, **options):
    """The gradient of the training loss: with this optimizer, what a step subtracts from the weights."""
    optimizer = optax.sgd(1.0)
    state = train.TrainState.init(model, optimizer, dtype=jnp.float64, zero=zero)
    options = {"compute_dtype": None, "clip": None, "accumulate": 4} | options
    state, metrics = train.make_step(optimizer, **options)(state, _batch(0))
    stacked = stack(model) if isinstance(model, mx.Mistral) else model
    before, after = (eqx.filter(tree, train.trained(tree)) for tree in (stacked, state.model))
    gradient = jax.tree.map(lambda one, other: jnp.asarray(np.asarray(one) - np.asarray(other)), before, after)
    return metrics, unstack(eqx.combine(gradient, state.model))


@functools.cache
def _gradient_of_one_device(config):
    with precision("float64"):
        return _gradient(random_model(config, "float64"), accumulate=1, label_smoothing=0.1, z_loss=1e-3)


# The results of one device.


@pytest.mark.parametrize(
    ("config", "layout", "axes", "options"),
    [
        # The default run has GPipe with experts.
        _long(PLAIN, "layers@pp batch@dp", {"pp": 2, "dp": 2}, {"zero": 1}),
        (PLAIN, "layers@pp", {"pp": 2}, ONE_BY_ONE),
        _slow(CONFIG, *THREE, {"zero": 1}),
        _slow(PLAIN, f"{THREE[0]} tokens@tp", THREE[1], {"zero": 2} | ONE_BY_ONE),
        _long(PLAIN, "layers@a,b batch@dp", {"a": 2, "b": 1, "dp": 2}, {"zero": 3, "accumulate": 2, "remat": "dots"}),
        _long(PLAIN, "layers@pp embed@tp batch@dp", {"pp": 2, "dp": 2, "tp": 2}, {"remat": "none"} | ONE_BY_ONE),
        # Two chunks of two layers with different windows, and four of one.
        _slow(DEEP, *THREE, {"chunks": 2, "zero": 2}),
        _slow(
            CONFIG4, "layers@pp tokens@tp kv_heads@tp hidden@tp vocab@tp batch@dp", THREE[1], {"chunks": 2, "zero": 3}
        ),
    ],
)
def test_the_gradient_of_the_training_loss_is_that_of_one_device(config, layout, axes, options):
    metrics, expected = _gradient_of_one_device(config)
    options = dict(options)
    with precision("float64"):
        model = _staged(random_model(config, "float64"), layout, axes, options.pop("chunks", 1))
        found, gradient = _gradient(model, label_smoothing=0.1, z_loss=1e-3, **options)
        np.testing.assert_allclose(found, metrics, rtol=FLOAT64_BOUND)
        # Weights near 1 have 16 digits, and their gradients near 0.01 then 14.
        assert worst_error(gradient, expected) < FLOAT64_BOUND


def _trained(model, steps, **options):
    optimizer = train.adamw(1e-2)
    state = train.TrainState.init(model, optimizer, dtype=jnp.float64, zero=options.pop("zero", 0))
    step, losses = train.make_step(optimizer, compute_dtype=None, **options), []
    for number in range(steps):
        state, metrics = step(state, _batch(number))
        losses.append(float(metrics.loss))
    return losses, state


@pytest.mark.long
def test_twenty_steps_are_those_of_one_device():
    """Four stages; a tied table, whose gradient comes from the first and from the last."""
    config = dataclasses.replace(CONFIG, tied=True, windows=(3,) * 4)
    with precision("float64"):
        model = random_model(config, "float64")
        expected, alone = _trained(model, 20)
        found, state = _trained(_staged(model, "layers@pp batch@dp", {"dp": 2, "pp": 4}), 20, accumulate=4, zero=1)
        # Thousands of operations in 20 steps, each off by 1e-16.
        np.testing.assert_allclose(found, expected, atol=1e-10)
        assert worst_error(state.unstacked(), alone.unstacked()) < 1e-10
        # A stage has its layers alone, and the table that all stages have.
        own = sum(
            leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(eqx.filter(state.model, eqx.is_array))
        )
        whole = CONFIG.vocab * CONFIG.embed + CONFIG.embed
        assert own == whole + (config.parameters - whole) // 4


@pytest.mark.parametrize(
    ("config", "layout", "axes", "chunks", "micro_batches"),
    [
        (CONFIG, "layers@pp vocab@tp", {"pp": 2, "tp": 2}, 1, 2),
        (CONFIG4, "layers@pp", {"pp": 2}, 2, 4),
        # As if there were two micro-batches more.
        _slow(dataclasses.replace(CONFIG4, layers=6, windows=(None,) * 6), "layers@pp", {"pp": 3}, 2, 4),
    ],
)
def test_logits_are_those_of_one_device(config, layout, axes, chunks, micro_batches):
    with precision("float64"):
        model = random_model(config, "float64")
        ids = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab, (ROWS, SEQ)), jnp.int32)
        run = eqx.filter_jit(lambda model, ids, **options: model(ids, **options))
        found = run(_staged(model, layout, axes, chunks), ids, micro_batches=micro_batches)
        assert worst_error(found, run(model, ids)) < FLOAT64_BOUND


@pytest.mark.long
def test_evaluations_adapters_and_the_model_afterwards():
    """In float32, sums in another order."""
    model = small_model(config=PLAIN)
    model = mx.apply_lora(model, rank=2, alpha=4.0, targets=LINEAR, key=jr.key(0))
    model = jax.tree.map(lambda leaf: leaf + 0.1 if eqx.is_inexact_array(leaf) else leaf, model)
    states = []
    for one in (model, _staged(model, "layers@pp batch@dp", {"pp": 2, "dp": 2})):
        state = train.TrainState.init(one, optax.sgd(0.1))
        state, _ = train.make_step(optax.sgd(0.1), compute_dtype=None, accumulate=2)(state, _batch(0))
        states.append((train.make_evaluation(compute_dtype=None)(state, _batch(1)), state.unstacked()))
    (expected, alone), (found, after) = states
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert after.strategy.layout == "batch@dp"
    ids = jnp.asarray(_batch(1).inputs)
    logits = [np.asarray(eqx.filter_jit(one)(ids)) for one in (after, alone)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
    for chunks in (1, 2):
        assert worst_error(unstack(stack(alone, chunks)), alone) == 0


@pytest.mark.slow
def test_a_run_continues_in_a_pipeline(tmp_path):
    """Two steps on one device, and two in stages: the weights of four steps on one device, in float32."""
    model, options = small_model(config=PLAIN), {"accumulate": 2, "compute_dtype": None, "progress": False}
    rows = [_batch(number) for number in range(4)]
    expected = train.Trainer(optax.sgd(0.1), **options).fit(model, rows)
    trainer = train.Trainer(optax.sgd(0.1), checkpoint_dir=tmp_path, schedule="1f1b", **options)
    trainer.fit(model, rows, steps=2)
    found = trainer.fit(_staged(model, "layers@pp", {"pp": 2}), rows, steps=4)
    assert worst_error(found, expected) < 1e-5


# What is exchanged, and what is refused.


@pytest.mark.parametrize(
    ("layout", "axes", "options"),
    [
        ("layers@pp hidden@tp", {"pp": 2, "tp": 2}, {}),
        ("layers@pp batch@dp", {"pp": 2, "dp": 2}, ONE_BY_ONE | {"zero": 2}),
        _long(*THREE, {"zero": 1}),
        _slow(*THREE, ONE_BY_ONE | {"zero": 1, "remat": "dots"}),
        _slow(f"{mx.SEQUENCE_PARALLEL.layout} layers@pp", {"pp": 2, "tp": 2}, ONE_BY_ONE),
        _long(f"{mx.KV_REPLICATED.layout} layers@pp", {"pp": 2, "kv": 2, "rep": 2}, ONE_BY_ONE | {"remat": "none"}),
        _slow(f"{mx.SEQUENCE_PARALLEL.layout} overlap layers@pp batch@dp", {"pp": 2, "tp": 2, "dp": 2}, ONE_BY_ONE),
        _long(f"{mx.SEQUENCE_PARALLEL.layout} layers@pp", {"pp": 2, "tp": 2}, {"remat": "dots"}),
    ],
)
def test_the_closed_form_is_what_the_programs_exchange(layout, axes, options):
    config = dataclasses.replace(COUNTED, layers=4, windows=(3, None) * 2)
    check_exchanges(config, layout, axes, _batch(0), accumulate=4, **options)


def check_exchanges(config, layout, axes, batch, *, accumulate, **options):
    """The exchanges of a forward pass and of a step in so many micro-batches are those of the closed forms."""
    rows, seq = batch.inputs.shape
    strategy, sizes = mx.Strategy(layout), {"batch": rows, "dtype": "float32"}
    model = with_strategy(stack(small_model(config=config)), strategy).on_mesh(with_auto_axes(mx.make_mesh(axes)))
    form = communication.forward_pass(config, strategy, axes, seq=seq, micro_batches=accumulate, **sizes)
    run = eqx.filter_jit(lambda model, ids: model(ids, micro_batches=accumulate))
    assert exchanges(run.lower(model, jnp.zeros((rows, seq), jnp.int32))) == _counted(form)
    training = Training(seq, accumulate=accumulate, **options)
    form = training_step(config, strategy, axes, training=training, **sizes)
    optimizer = train.adamw(1e-3)
    state = eqx.filter_eval_shape(lambda: train.TrainState.init(model, optimizer, zero=training.zero))
    shapes, static = eqx.partition(state, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    options = {"remat": training.remat, "schedule": training.schedule}
    step = train.make_step(optimizer, compute_dtype="float32", accumulate=accumulate, **options)
    program = jax.jit(lambda shapes, batch: eqx.filter(step(eqx.combine(shapes, static), batch), eqx.is_array))
    assert exchanges(program.lower(shapes, batch)) == _counted(form)


def test_what_has_no_closed_form_is_refused():
    strategy, axes = mx.Strategy("layers@pp batch@dp"), {"pp": 2, "dp": 2}
    with refused("no closed form", "layers@pp"):
        training_step(CONFIG, strategy, axes, batch=8, training=Training(SEQ, 3, accumulate=4))
    with refused("1 micro-batches", "2 stages"):
        training_step(CONFIG, strategy, axes, batch=8, training=Training(SEQ))


def _ticks(stages, micro_batches, schedule):
    """For each tick and stage, the micro-batch of the forward and that of the backward pass."""

    def own(at):
        return at if 0 <= at < micro_batches else None

    if schedule == "gpipe":
        forward = [[(own(at - stage), None) for stage in range(stages)] for at in range(micro_batches + stages - 1)]
        return forward + [[(None, found) for found, _ in tick] for tick in reversed(forward)]
    late = 2 * (stages - 1)
    return [
        [(own(at - stage), own(at - late + stage)) for stage in range(stages)] for at in range(micro_batches + late)
    ]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (3, 4), (4, 9)])
def test_what_a_stage_needs_was_sent_to_it(schedule, stages, micro_batches):
    ticks = _ticks(stages, micro_batches, schedule)
    done = {
        (stage, direction, micro_batch): number
        for number, tick in enumerate(ticks)
        for stage, pair in enumerate(tick)
        for direction, micro_batch in enumerate(pair)
        if micro_batch is not None
    }
    assert len(done) == 2 * stages * micro_batches
    kept = [0] * stages
    for (stage, direction, micro_batch), number in done.items():
        source = stage + (1 if direction else -1)
        # GPipe begins the backward pass in the tick after the loss, 1F1B in the same one.
        if 0 <= source < stages:
            assert done[source, direction, micro_batch] == number - 1
        if direction == 0:
            last = done[stage, 1, micro_batch]
            kept[stage] = max(kept[stage], sum(number <= done[stage, 0, of] <= last for of in range(micro_batches)))
    bound = micro_batches if schedule == "gpipe" else min(2 * stages - 1, micro_batches)
    assert max(kept) == bound


def _interleaved(stages, micro_batches, chunks):
    """For each tick and stage, the micro-batch and the chunk of the forward pass."""

    def own(turn):
        if not 0 <= turn < micro_batches * chunks:
            return None
        first, within = divmod(turn, stages * chunks)
        return first * stages + within % stages, within // stages

    return [[own(at - stage) for stage in range(stages)] for at in range(micro_batches * chunks + stages - 1)]


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [(2, 4, 2), (3, 3, 4), (4, 8, 3)])
def test_what_a_chunk_needs_was_sent_in_the_tick_before(stages, micro_batches, chunks):
    done = {
        (stage, *own): number
        for number, tick in enumerate(_interleaved(stages, micro_batches, chunks))
        for stage, own in enumerate(tick)
        if own is not None
    }
    assert len(done) == stages * micro_batches * chunks
    for (stage, micro_batch, chunk), number in done.items():
        if stage or chunk:
            # On the ring, the last stage is before the first.
            source = (stage - 1, micro_batch, chunk) if stage else (stages - 1, micro_batch, chunk - 1)
            assert done[source] == number - 1


def test_the_pictures_of_the_page_are_the_schedules():
    page = (Path(__file__).parents[1] / "docs" / "pipelines.md").read_text()
    ticks = _interleaved(3, 3, 2)
    for stage in range(3):
        cells = ["." if tick[stage] is None else f"{tick[stage][0]}{'ab'[tick[stage][1]]}" for tick in ticks]
        assert f"    stage {stage}   {''.join(cell.ljust(4) for cell in cells).rstrip()}\n" in page
    for schedule in ("gpipe", "1f1b"):
        ticks = _ticks(3, 4, schedule)
        width = 4 if schedule == "gpipe" else 6

        def cell(forward, backward, schedule=schedule):
            there, back = ("." if found is None else str(found) for found in (forward, backward))
            back = back if backward is None else f"{back}'"
            return f"{there} {back}" if schedule == "1f1b" else back if forward is None else there

        for stage in range(3):
            row = "".join(cell(*tick[stage]).ljust(width) for tick in ticks).rstrip()
            assert f"    stage {stage}   {row}\n" in page


def _permutes(lowered):
    """The number and bytes of what is sent from stage to stage."""
    ((_, size, _), count) = next(item for item in exchanges(lowered).items() if item[0][0] == "collective_permute")
    return count, size


@pytest.mark.slow
def test_the_bubble_is_in_the_number_of_ticks():
    """A tick is one exchange; a stage has work in `micro_batches` of them."""
    stages, micro_batches = 4, 8
    config = dataclasses.replace(CONFIG, windows=(None,) * 4)
    model = _staged(small_model(config=config), "layers@pp", {"pp": stages})
    ticks = micro_batches + stages - 1
    size = ROWS // micro_batches * SEQ * CONFIG.embed * 4
    lowered = eqx.filter_jit(lambda model, ids: model(ids, micro_batches=micro_batches)).lower(
        model, jnp.zeros((ROWS, SEQ), jnp.int32)
    )
    assert _permutes(lowered) == (ticks, size)
    state = train.TrainState.init(model, optax.sgd(1.0))
    step = train.make_step(optax.sgd(1.0), compute_dtype=None, accumulate=micro_batches)
    # As many again for gradients, in the other direction.
    assert _permutes(eqx.filter_jit(step).lower(state, _batch(0))) == (2 * ticks, size)
    step = train.make_step(optax.sgd(1.0), compute_dtype=None, accumulate=micro_batches, schedule="1f1b")
    ticks += stages - 1
    assert _permutes(eqx.filter_jit(step).lower(state, _batch(0))) == (2 * ticks, size)
    # With two chunks, a tick has half of the work of a stage.
    stages, chunks = 2, 2
    state = train.TrainState.init(
        _staged(small_model(config=config), "layers@pp", {"pp": stages}, chunks), optax.sgd(1.0)
    )
    step = train.make_step(optax.sgd(1.0), compute_dtype=None, accumulate=micro_batches)
    assert _permutes(eqx.filter_jit(step).lower(state, _batch(0))) == (2 * (chunks * micro_batches + stages - 1), size)


@pytest.mark.slow
def test_one_by_one_keeps_the_activations_of_few_micro_batches():
    """GPipe keeps the input of each layer in each tick, one by one that of a stage in `2 stages - 1` ticks."""
    config = dataclasses.replace(PLAIN, layers=4, windows=(None,) * 4)
    state = train.TrainState.init(_staged(small_model(config=config), "layers@pp", {"pp": 2}), optax.sgd(1.0))
    temporary = {}
    for schedule in ("gpipe", "1f1b"):
        for count in (4, 16):
            step = train.make_step(optax.sgd(1.0), compute_dtype=None, accumulate=count, schedule=schedule)
            rows = train.one_a_row([train.causal([1, 2])] * count, 64)
            sizes = eqx.filter_jit(step, donate="all").lower(state, rows).compile().compiled.memory_analysis()
            temporary[schedule, count] = sizes.temp_size_in_bytes
            print(f"| {schedule} | {count} | {sizes.temp_size_in_bytes:,} |")  # noqa: T201
    stream = 64 * CONFIG.embed * 4
    # Two layers of a stage, in 12 more ticks; and the activations after each tick.
    assert temporary["gpipe", 16] - temporary["gpipe", 4] >= 12 * 3 * stream
    # A copy of the batch, six arrays of numbers of 4 bytes, and the indices of its rows.
    assert temporary["1f1b", 16] - temporary["1f1b", 4] < 12 * 6 * 64 * 4 + 256
    assert temporary["1f1b", 16] < temporary["gpipe", 16]


@pytest.mark.parametrize(
    ("config", "layout", "axes", "words"),
    [
        (CONFIG, "layers@pp", {"pp": 3}, ("4 layers", "3 devices", "leave 'layers' out")),
        (CONFIG, "layers@pp", {"pp": 4}, ("4 stages", "windows differ", "fewer devices")),
        (LATENT, "layers@pp", {"pp": 2}, ("2 stages", "only the first 1 of 2 layers are dense", "leave 'layers' out")),
        (CONFIG, "layers@pp seq@cp", {"pp": 2, "cp": 2}, ("'layers' and 'seq'", "leave one of them out")),
        (CONFIG, "layers@a hidden@a", {"a": 2}, ("'layers' and 'hidden'", "'a'", "another axis")),
        (CONFIG, "batch@a layers@b,a", {"a": 2, "b": 1}, ("'layers' and 'batch'", "'a'")),
    ],
)
def test_what_cannot_be_split_into_stages_is_refused(config, layout, axes, words):
    with refused(*words):
        mx.Strategy(layout).check(config, AbstractMesh(tuple(axes.values()), tuple(axes)))


def test_what_a_pipeline_cannot_do_is_refused():
    model = small_model(config=CONFIG)
    with refused("'layers'", "not stacked", "mistral_eqx.nn.stack(model)"):
        mx.shard(model, mx.make_mesh("pp=2"), mx.Strategy("layers@pp"))
    staged = _staged(model, "layers@pp batch@dp", {"pp": 2, "dp": 2})
    with refused("6 rows", "2 micro-batches", "multiple of 4"):
        staged(jnp.zeros((6, 4), jnp.int32), micro_batches=2)
    with refused("Stacked", "must be a Mistral", "mistral_eqx.nn.unstack"):
        mx.generate(staged, [[1, 2]], max_new_tokens=2)
    optimizer = optax.sgd(1.0)
    with refused("1 micro-batches", "2 stages", "at least 2"):
        train.make_step(optimizer)(train.TrainState.init(staged, optimizer), _batch(0))
    with refused("4 layers", "3 chunks", "fewer"):
        stack(model, chunks=3)
    with refused("4 layers", "4 chunks with the same windows"):
        stack(model, chunks=4)
    with refused("over 1 layers or repeats", "2 stages", "fewer chunks"):
        _staged(model, "layers@pp", {"pp": 2}, 2)
    chunked = _staged(small_model(config=CONFIG4), "layers@pp", {"pp": 2}, 2)
    with refused("2 chunks", "chunks=1"):
        in_stages(chunked)
    for options in ({"accumulate": 3}, {"accumulate": 4} | ONE_BY_ONE):
        with refused("2 chunks", "'gpipe'", "multiple of the 2 stages"):
            train.make_step(optimizer, **options)(train.TrainState.init(chunked, optimizer), _batch(0))
    with refused("several chunks", "remat='none'"):
        train.make_step(optimizer, accumulate=2, remat="none")(train.TrainState.init(chunked, optimizer), _batch(0))
    adapted = mx.apply_lora(model, rank=2, alpha=4.0, targets=LINEAR, dropout=0.5, key=jr.key(0))
    state = train.TrainState.init(_staged(adapted, "layers@pp", {"pp": 2}), optimizer)
    with refused("drop no entries", "'layers@pp'", "dropout=0"):
        train.make_step(optimizer, accumulate=2)(state, _batch(0))
