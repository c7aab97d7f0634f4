"""Texts in rows: nothing is lost, and nothing is seen that belongs to another."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mistral_eqx.nn import attention_mask
from mistral_eqx.nn.mask import bounds
from mistral_eqx.train import Batch, causal, cut, one_a_row, pack, prefix_lm


def attention(batch):
    """Which column each one sees, as attention computes it."""
    columns = np.where(batch.positions < 0, -1, np.arange(batch.inputs.shape[1], dtype=np.int32)[None])
    columns = jnp.asarray(columns)
    return np.asarray(attention_mask(*bounds(columns, None, batch.span), columns))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(8, 20))
def test_packed_texts_are_found_again(lengths, seq):
    texts = [np.arange(length, dtype=np.int32) + 100 * number for number, length in enumerate(lengths)]
    batch = pack([causal(text) for text in texts], seq)
    sees, found = attention(batch), set()
    for row in range(batch.inputs.shape[0]):
        for column in range(seq):
            here = (row, column)
            if batch.positions[here] < 0:
                assert batch.weights[here] == 0
                # Nobody sees padding, nor does it see anyone.
                assert not sees[row, :, column].any()
                assert not sees[row, column].any()
                continue
            number, place = divmod(int(batch.inputs[here]), 100)
            found.add((number, place))
            assert batch.positions[here] == place
            assert batch.targets[here] == texts[number][place + 1]
            assert batch.weights[here] == 1
            seen = batch.inputs[row][sees[row, column]]
            np.testing.assert_array_equal(seen, texts[number][: place + 1])
    assert found == {(number, place) for number, length in enumerate(lengths) for place in range(length - 1)}


def test_each_text_goes_into_the_first_row_with_room():
    examples = [causal(range(length + 1)) for length in (5, 4, 3, 4, 1)]
    batch = pack(examples, 8)
    assert [np.flatnonzero(row == 0).tolist() for row in batch.positions] == [[0, 5], [0, 4], [0]]
    assert (batch.positions >= 0).sum(axis=1).tolist() == [8, 8, 1]
    alone = one_a_row(examples, 8)
    assert (alone.positions >= 0).sum(axis=1).tolist() == [5, 4, 3, 4, 1]


def test_a_prefix_is_seen_where_its_row_has_it():
    first, second = prefix_lm([1, 2, 3, 4], 2), prefix_lm([5, 6, 7, 8, 9], 3)
    sees = attention(pack([first, second], 8))[0].astype(int)
    np.testing.assert_array_equal(
        sees,
        [
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
        ],
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12))
def test_each_token_of_a_long_text_is_a_target_once(length, seq):
    examples = [causal(piece) for piece in cut(range(length), seq)]
    assert all(len(example.inputs) <= seq for example in examples)
    assert np.concatenate([example.targets for example in examples]).tolist() == list(range(1, length))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="A sequence of 5 tokens does not fit into a row of 4; cut it"):
        one_a_row([causal(range(6))], 4)
    with pytest.raises(ValueError, match="There are no examples"):
        pack([], 4)


def test_arrays_of_a_batch_are_numpy_s():
    """The host prepares the next batch while the devices compute."""
    batch = pack([causal(range(5))], 6)
    assert isinstance(batch, Batch)
    assert all(isinstance(array, np.ndarray) for array in vars(batch).values())
