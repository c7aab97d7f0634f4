import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.generation import refused
from hypothesis import given, settings, strategies as st

from mistral_eqx.generation.caches import capacity
from mistral_eqx.generation.prompt import bucket, checked_prompts, pad_left
from mistral_eqx.generation.reading import prompt_width


powers_of_two = st.integers(0, 6).map(lambda exponent: 2**exponent)
quick = settings(deadline=None, max_examples=100, derandomize=True)


@quick
@given(length=st.integers(1, 10**6), step=powers_of_two, per_octave=powers_of_two)
def test_a_bucket_holds_the_length_and_wastes_little(length, step, per_octave):
    size = bucket(length, step=step, per_octave=per_octave)
    assert size >= max(length, step)
    assert size % step == 0
    assert size - length < step or (size - length) * per_octave < size
    assert size <= bucket(length + 1, step=step, per_octave=per_octave)
    assert size == bucket(size, step=step, per_octave=per_octave)


@quick
@given(exponent=st.integers(0, 9), step=powers_of_two, per_octave=powers_of_two)
def test_there_are_few_buckets(exponent, step, per_octave):
    octave = range(2**exponent + 1, 2 ** (exponent + 1) + 1)
    sizes = {bucket(length, step=step, per_octave=per_octave) for length in octave}
    assert len(sizes) <= per_octave


def test_widths_of_prompts_and_capacities_of_caches():
    lengths = (1, 16, 17, 24, 33, 128, 129, 257, 300, 512, 513, 1025)
    assert [prompt_width(length) for length in lengths] == [16, 16, 32, 32, 48, 128, 144, 288, 320, 512, 576, 1152]
    assert [capacity(slots) for slots in (1, 128, 129, 257, 513, 5000)] == [128, 128, 256, 384, 768, 6144]


@quick
@given(rows=st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=6), min_size=1, max_size=4), data=st.data())
def test_padded_rows_end_together(rows, data):
    starts = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    ids, positions = (np.asarray(array) for array in pad_left(rows, 8, starts))
    assert ids.dtype == positions.dtype == np.int32
    for index, row in enumerate(rows):
        first = starts[index] if starts else 0
        assert ids[index, 8 - len(row) :].tolist() == row
        assert positions[index].tolist() == [-1] * (8 - len(row)) + list(range(first, first + len(row)))


@pytest.mark.parametrize(
    "prompts",
    [
        [[1, 2, 3], [4, 5, 6]],
        ((1, 2, 3), (4, 5, 6)),
        np.array([[1, 2, 3], [4, 5, 6]], np.uint16),
        jnp.array([[1, 2, 3], [4, 5, 6]]),
    ],
    ids=["lists", "tuples", "numpy", "jax"],
)
def test_prompts_come_as_lists_or_arrays(prompts):
    rows = checked_prompts(prompts, 7)
    assert rows == [[1, 2, 3], [4, 5, 6]]
    assert {type(id) for row in rows for id in row} == {int}


def test_prompts_may_have_any_lengths():
    prompts = [[1], np.array([2, 3]), (4, 5, 6)]
    assert checked_prompts(prompts, 7) == [[1], [2, 3], [4, 5, 6]]


def test_trap_16_bit_token_ids_overflow_large_vocabularies():
    largest = 131_071
    (row,) = checked_prompts([np.array([largest])], largest + 1)
    ids, _ = pad_left([row], 1)
    assert ids.tolist() == [[largest]]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], ["There is no prompt"]),
        (np.zeros((0, 3), np.int32), ["There is no prompt"]),
        ([[1], []], ["Prompt 1 is empty"]),
        (np.zeros((2, 0), np.int32), ["Prompt 0 is empty"]),
        ([[1, 2], [3, -1]], ["Prompt 1", "token id -1", "vocabulary of 7"]),
        ([[1, 7]], ["Prompt 0", "token id 7", "vocabulary of 7"]),
        ([[2**40]], ["Prompt 0", str(2**40)]),
        ([[2**80]], ["Prompt 0", "flat list of token ids"]),
        ([[1.0, 2.0]], ["Prompt 0 is [1.0, 2.0]", "flat list of token ids"]),
        ([[True, False]], ["Prompt 0", "flat list of token ids"]),
        ([[[1, 2], [3, 4]]], ["Prompt 0 is [[1, 2], [3, 4]]", "flat list of token ids"]),
        ([[1], [1, [2, 3]]], ["Prompt 1 is [1, [2, 3]]", "flat list of token ids"]),
        ([1, 2, 3], ["Prompt 0 is 1", "flat list of token ids"]),
        ([[1], "Hello"], ["Prompt 1 is the text 'Hello'", "tokenizer"]),
        ("Hello", ["Prompt 0 is the text 'Hello'", "tokenizer"]),
        (b"Hello", ["The prompts are b'Hello'", "lists of token ids"]),
        (5, ["The prompts are 5", "lists of token ids"]),
        ([[5, True, 6]], ["Prompt 0 is [5, True, 6]", "flat list of token ids"]),
        ([None], ["Prompt 0 is None", "flat list of token ids"]),
        (np.zeros((2, 100, 100), np.int32), ["Prompt 0", "flat list of token ids"]),
    ],
)
def test_bad_prompts_are_refused_in_one_sentence(prompts, words):
    with refused(*words):
        checked_prompts(prompts, 7)
