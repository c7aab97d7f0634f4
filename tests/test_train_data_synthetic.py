"""Sets that are made: their answers are right, and what is held out is in none of the others."""

import itertools

import numpy as np
import pytest
from fixtures.generation import refused

from mistral_eqx.train import data


SETS = {
    "sort": lambda **how: data.Sort(4, 3, **how),
    "adder": lambda **how: data.Adder(2, **how),
}


def rows(array):
    return {tuple(row) for row in array.tolist()}


@pytest.mark.parametrize("name", SETS)
def test_what_is_held_out_is_never_trained_on(name):
    known, held_out = SETS[name](), SETS[name](held_out=True)
    assert not rows(known.prompts) & rows(held_out.prompts)
    # Together they are all there are, each once.
    every = rows(known.prompts) | rows(held_out.prompts)
    assert len(every) == len(known) + len(held_out)
    assert len(every) == known.vocab ** known.prompts.shape[1]
    assert len(held_out) == min(len(every) // 5, 1000)
    assert rows(SETS[name](held_out=True, seed=1).prompts) != rows(held_out.prompts)
    assert (SETS[name](held_out=True).prompts == held_out.prompts).all()


@pytest.mark.parametrize("name", SETS)
def test_an_example_learns_the_answer_alone(name):
    problems = SETS[name](held_out=True)
    answers, prompts = problems.answers, problems.prompts
    for index in (0, 3, len(problems) - 1):
        example = problems[index]
        assert len(example.inputs) == problems.seq
        told = example.targets[example.weights == 1]
        np.testing.assert_array_equal(told, answers[index])
        np.testing.assert_array_equal(example.inputs[: prompts.shape[1]], prompts[index])
        np.testing.assert_array_equal(example.inputs[1:], example.targets[:-1])
        assert example.weights.sum() == answers.shape[1]


def test_sorted_symbols():
    problems = data.Sort(6, 3)
    assert (len(problems), problems.vocab, problems.seq) == (729 - 145, 3, 11)
    for prompt, answer in zip(problems.prompts.tolist(), problems.answers.tolist(), strict=True):
        assert answer == sorted(prompt)
    # As in all 729, each symbol is as frequent as another: 584 * 6 draws without replacement, five standard deviations.
    shares = np.bincount(problems.prompts.reshape(-1), minlength=3) / problems.prompts.size
    assert np.abs(shares - 1 / 3).max() < 5 * np.sqrt(2 / 9 / problems.prompts.size)


def test_sums_are_said_from_the_smallest_digit():
    problems = data.Adder(2)
    assert (len(problems), problems.vocab, problems.seq) == (9000, 10, 6)
    for prompt, answer in zip(problems.prompts.tolist(), problems.answers.tolist(), strict=True):
        first, second = (int("".join(map(str, part))) for part in (prompt[:2], prompt[2:]))
        assert answer == [int(digit) for digit in f"{first + second:03d}"[::-1]]
    np.testing.assert_array_equal(problems.solve(np.asarray([[8, 5, 5, 0]], np.int32)), [[5, 3, 1]])
    assert data.Adder(3)[0].inputs.shape == (9,)


def test_characters():
    text = "".join(itertools.islice(itertools.cycle("the whale, the sea; "), 95)) + "ENDED"
    known, held_out = data.Characters(text, 8), data.Characters(text, 8, held_out=True)
    assert known.alphabet == held_out.alphabet == "".join(sorted(set(text)))
    assert known.vocab == len(set(text))
    assert known.decode(known.encode(text)) == text
    assert known.decode([known.vocab, *known.encode("the"), known.vocab + 5]) == "the"

    def told(example):
        return known.decode([example.inputs[0], *example.targets])

    assert [told(known[index]) for index in range(len(known))] == [text[start : start + 9] for start in range(90 - 8)]
    # What is held out is told once, and begins where the other ends.
    assert [told(held_out[index]) for index in range(len(held_out))] == [text[90:99], text[98:]]
    assert (known[0].weights == 1).all()


def test_wrong_input_is_refused():
    with refused("4 such problems"):
        data.Sort(2, 2)
    with refused("digits is 4", "at most 3"):
        data.Adder(4)
    with refused("100 characters", "rows of 10"):
        data.Characters("ab" * 50, 10, held_out=True)
    with refused("rows of 8"):
        data.Characters("", 8)
    with refused("'Z'"):
        data.Characters("ab" * 50, 5).encode("abZ")


def test_batches_of_a_set():
    problems = data.Sort(3, 3)
    made = data.batches(problems, rows=len(problems), seq=problems.seq, epochs=1)
    (batch,) = made
    assert rows(batch.inputs[:, :3]) == rows(problems.prompts)
    assert batch.weights.sum() == 3 * len(problems)
