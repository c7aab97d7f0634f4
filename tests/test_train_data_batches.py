"""Batches of a source: the same ones again, each example once, and nothing lost between processes or rows."""

import importlib.util
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.generation import refused
from hypothesis import given, settings, strategies as st

from mistral_eqx.nn import attention_mask
from mistral_eqx.nn.mask import bounds
from mistral_eqx.train import Batch, Example, bert_mask, causal, data, one_a_row, pack, prefix_lm


SEQ = 9


def texts(count, *, seed=0):
    """Texts of 2 to 10 tokens; the token `100 * text + place`, so that each is known wherever it stands."""
    lengths = np.random.default_rng(seed).integers(2, SEQ + 2, count)
    return [np.arange(length, dtype=np.int32) + 100 * number for number, length in enumerate(lengths)]


def drawn(ids, random):
    """An objective that draws."""
    return prefix_lm(ids, random.integers(1, len(ids)))


def fields(batch):
    return {name: np.asarray(getattr(batch, name)) for name in Batch.__dataclass_fields__}


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name, values in fields(one).items():
            np.testing.assert_array_equal(values, getattr(other, name))
            assert values.dtype == getattr(other, name).dtype


def first_tokens(batch):
    """The numbers of the texts that are in a batch."""
    return (batch.inputs[batch.positions == 0] // 100).tolist()


def take(batches, count):
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("packing", [False, True])
def test_each_example_comes_once_an_epoch_in_another_order(packing):
    source = texts(23)
    made = data.batches(source, rows=4, seq=SEQ, epochs=3, packing=packing, remainder="pad")
    order = [number for batch in made for number in first_tokens(batch)]
    if packing:
        # First fit puts an example into an earlier row than the one before: only whole batches are in order.
        assert sorted(order) == sorted([*range(23)] * 3)
        return
    epochs = [order[start : start + 23] for start in (0, 23, 46)]
    assert len(order) == 69
    assert all(sorted(epoch) == [*range(23)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    in_order = data.batches(source, rows=4, seq=SEQ, epochs=1, shuffle=False, remainder="pad")
    assert [number for batch in in_order for number in first_tokens(batch)] == [*range(23)]


def test_the_seed_decides_the_order_and_what_is_drawn():
    def run(seed):
        return take(data.batches(texts(23), rows=4, seq=SEQ, objective=drawn, seed=seed), 12)

    first, again, other = run(0), run(0), run(5)
    assert_same(first, again)
    assert any((one.inputs != two.inputs).any() for one, two in zip(first, other, strict=True))


def test_an_objective_draws_anew_in_each_epoch():
    source = [np.arange(40)] * 2
    objective = lambda ids, random: bert_mask(ids, random, mask_id=99, vocab=50)  # noqa: E731
    made = take(data.batches(source, rows=2, seq=40, objective=objective), 3)
    rows = [row.tobytes() for batch in made for row in batch.weights]
    assert len(set(rows)) == 6


@settings(max_examples=8, deadline=None)
@given(stop=st.integers(0, 18), packing=st.booleans(), epochs=st.sampled_from([2, None]), used=st.integers(0, 3))
def test_an_iterator_goes_on_where_another_stood(stop, packing, epochs, used):
    """Also in a later epoch, after a packed batch, at the end, and if the iterator was used before."""
    made = data.batches(
        texts(23),
        rows=3,
        seq=SEQ,
        objective=drawn,
        packing=packing,
        epochs=epochs,
        remainder="pad" if epochs else "drop",
    )
    expected = take(made, 18)
    iterator = iter(made)
    assert_same(take(iterator, stop), expected[:stop])
    # As it comes back from a checkpoint.
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(made)
    take(resumed, used)
    resumed.set_state(state)
    assert_same(take(resumed, 18 - stop), expected[stop:])
    assert resumed.get_state() == state_after(made, 18)


def state_after(made, count):
    iterator = iter(made)
    take(iterator, count)
    return iterator.get_state()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"rows": 4}, ["rows 2, here 4"]),
        ({"seed": 1}, ["seed 0, here 1"]),
        ({"packing": True}, ["packing False, here True"]),
        ({"source": [[1, 2, 3]] * 8}, ["examples"]),
    ],
)
def test_a_position_among_other_batches_is_refused(other, words):
    """Examples would be passed over or come twice without a word."""
    options = {"source": texts(8), "rows": 2, "seq": SEQ}
    stood, goes_on = (data.batches(**made) for made in (options, options | other))
    iterator = iter(stood)
    next(iterator)
    with refused("position", *words):
        iter(goes_on).set_state(iterator.get_state())
    with refused("no position"):
        iter(stood).set_state({"next_index": 3})


def assert_together(parts, whole):
    """The rows of the processes, one after the other, are those of the whole."""
    assert [len(part) for part in parts] == [len(whole)] * len(parts)
    for number, batch in enumerate(whole):
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[number][name] for part in parts]), values)


@pytest.mark.parametrize("packing", [False, True])
def test_processes_have_together_what_one_would_have(packing):
    def run(shard, after=None):
        made = data.batches(
            texts(23), rows=6, seq=SEQ, objective=drawn, packing=packing, epochs=2, shard=shard, remainder="pad"
        )
        iterator = iter(made)
        if after is not None:
            iterator.set_state(after)
        return [fields(batch) for batch in iterator], iterator.get_state()

    whole, state = run((0, 1))
    parts = [run((index, 3)) for index in range(3)]
    assert_together([part for part, _ in parts], whole)
    # The position is that of the batch, so that a run may go on with another number of processes.
    assert all(reached == state for _, reached in parts)
    iterator = iter(data.batches(texts(23), rows=6, seq=SEQ, objective=drawn, packing=packing, epochs=2))
    take(iterator, 2)
    assert_together([run((index, 2), iterator.get_state())[0] for index in range(2)], whole[2:])


def test_all_batches_have_the_same_shape_and_the_last_one_is_filled_up_or_dropped():
    made = [*data.batches(texts(10), rows=4, seq=SEQ, epochs=1, shuffle=False, remainder="pad")]
    assert [batch.inputs.shape for batch in made] == [(4, SEQ)] * 3
    assert (made[-1].positions[2:] == -1).all()
    assert not made[-1].weights[2:].any()
    assert_same(made[:2], [one_a_row([causal(text) for text in texts(10)[at : at + 4]], SEQ) for at in (0, 4)])
    assert len([*data.batches(texts(10), rows=4, seq=SEQ, epochs=1, shuffle=False)]) == 2
    # Epochs follow each other without a gap.
    assert len([*data.batches(texts(10), rows=4, seq=SEQ, epochs=2, shuffle=False)]) == 5


def test_packed_batches_are_those_of_pack():
    """Grain packs as `pack` does, until an example fits nowhere."""
    examples = [drawn(text, np.random.default_rng(number)) for number, text in enumerate(texts(40))]
    made = [*data.batches(examples, rows=3, seq=16, packing=True, shuffle=False, epochs=1, remainder="pad")]
    assert len(made) > 3
    start = 0
    for batch in made:
        count = len(first_tokens(batch))
        expected = pack(examples[start : start + count], 16)
        rows = expected.inputs.shape[0]
        assert rows == 3 or batch is made[-1]
        for name, values in fields(batch).items():
            np.testing.assert_array_equal(values[:rows], getattr(expected, name))
        assert (batch.positions[rows:] == -1).all()
        start += count
        if start < len(examples):
            # One more would have taken another row.
            assert pack(examples[start - count : start + 1], 16).inputs.shape[0] == 4
    assert start == 40


def test_trap_the_first_example_decides_no_types():
    """One whose weights are whole numbers must not round those of others."""
    whole = Example(*(np.asarray([1, 2]) for _ in Example._fields))
    half = causal([7, 8, 9], [0.5, 0.5, 0.25])
    (batch,) = data.batches([whole, half], rows=1, seq=4, packing=True, shuffle=False, epochs=1)
    assert batch.weights.tolist() == [[1, 2, 0.5, 0.25]]
    assert (batch.inputs.dtype, batch.weights.dtype) == (np.int32, np.float32)


def test_packed_texts_do_not_see_each_other():
    (batch,) = take(data.batches(texts(40), rows=3, seq=16, packing=True), 1)
    columns = jnp.asarray(np.where(batch.positions < 0, -1, np.arange(16, dtype=np.int32)))
    sees = np.asarray(attention_mask(*bounds(columns, None, batch.span), columns))
    for row, column in zip(*np.nonzero(batch.positions >= 0), strict=True):
        seen = batch.inputs[row][sees[row, column]]
        text, place = divmod(int(batch.inputs[row, column]), 100)
        np.testing.assert_array_equal(seen, 100 * text + np.arange(place + 1))
        assert batch.positions[row, column] == place
        assert batch.targets[row, column] == 100 * text + place + 1
        assert batch.weights[row, column] == 1


def test_what_makes_no_batch_is_refused():
    source = texts(8)
    with refused("no examples"):
        data.batches([], rows=1, seq=4)
    with refused("rows is 9", "8 examples"):
        data.batches(source, rows=9, seq=SEQ)
    with refused("3 processes", "4 rows"):
        data.batches(source, rows=4, seq=SEQ, shard=(0, 3))
    with refused("no process 2 of 2"):
        data.batches(source, rows=4, seq=SEQ, shard=(2, 2))
    with refused("epochs=1"):
        data.batches(source, rows=2, seq=SEQ, remainder="pad")


@pytest.mark.parametrize("packing", [False, True])
def test_an_example_that_is_too_long_is_refused(packing):
    made = data.batches([np.arange(SEQ + 2)] * 2, rows=2, seq=SEQ, packing=packing)
    with refused(f"{SEQ + 1} tokens", f"row of {SEQ}", "data.Pieces"):
        next(iter(made))


def test_without_grain_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "grain" else find(name))
    with refused("Grain", "pip install 'mistral-eqx[train]'"):
        data.batches(texts(4), rows=2, seq=SEQ)
