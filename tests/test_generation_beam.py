import dataclasses
import importlib
import itertools
import math
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.cli import save_tiny_model
from fixtures.equality import on, precision, random_model
from fixtures.generation import PROMPTS, VOCAB, count_compilations, logits_of, random_prompts, refused, talking_model
from fixtures.model import small_model
from hypothesis import given, settings, strategies as st
from test_nn_decoding import CONFIG, KV_SEQ, _computations, _instructions

import mistral_eqx as mx
from mistral_eqx import beam_search, generate
from mistral_eqx.nn import Cache, Mistral


beam = importlib.import_module("mistral_eqx.generation.beam")


def log_probabilities(model, text):
    logits = logits_of(model, text, width=64)[-1].astype(np.float64)
    return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())


def score_of(model, prompt, text):
    """The sum of the log-probabilities of a text's tokens, from one forward pass."""
    logits = logits_of(model, prompt + text, width=64 * math.ceil((len(prompt) + len(text)) / 64)).astype(np.float64)
    logits = logits[len(prompt) - 1 : -1]
    largest = logits.max(axis=1, keepdims=True)
    found = logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    return found[np.arange(len(text)), text].sum()


def searched_by_hand(model, prompt, beams, new, *, penalty=1.0, early=False, ends=()):
    """What beam search means, in lists: one forward pass over the whole text for each text and step.

    **Returns:** the texts that ended, best first, with their scores.
    """
    running, ended = [(0.0, [])], []
    for length in range(1, new + 1):
        candidates = []
        for score, text in running:
            found = log_probabilities(model, prompt + text)
            candidates += [(score + found[token], [*text, token]) for token in range(len(found))]
        candidates.sort(key=lambda candidate: -candidate[0])
        stops = [text[-1] in ends or length == new for _, text in candidates]
        for (score, text), stop in list(zip(candidates, stops, strict=True))[:beams]:
            if stop:
                ended.append((score / length**penalty, text))
        ended = sorted(ended, key=lambda one: -one[0])[:beams]
        running = [candidate for candidate, stop in zip(candidates, stops, strict=True) if not stop][:beams]
        if len(ended) == beams and running:
            longest = new if early == "never" and penalty > 0 else length
            if early is True or running[0][0] / longest**penalty <= ended[-1][0]:
                break
    return ended


def texts(best):
    """The texts of each prompt without what is repeated behind their ends, and their scores."""
    return [
        [(row[:length].tolist(), float(score)) for row, length, score in zip(*found, strict=True)]
        for found in zip(*map(np.asarray, best), strict=True)
    ]


def assert_found(best, expected):
    for found, row in zip(texts(best), expected, strict=True):
        assert [text for text, _ in found] == [text for _, text in row[: len(found)]]
        np.testing.assert_allclose([score for _, score in found], [score for score, _ in row[: len(found)]], rtol=2e-5)


@pytest.mark.parametrize(
    ("windows", "beams", "options"),
    [
        pytest.param((None, 7), 4, {}, marks=pytest.mark.slow),
        pytest.param((None, 7), 4, {"ends": (5, 44), "penalty": 0.6}, marks=pytest.mark.slow),
        ((None, 7), 4, {"ends": (5, 44), "penalty": 2.0, "early": "never"}),
        pytest.param((None, 7), 4, {"ends": (5, 44), "penalty": 1.0, "early": True}, marks=pytest.mark.slow),
        pytest.param((7, 7), 3, {"ends": (44,), "penalty": -1.0, "early": "never"}, marks=pytest.mark.slow),
        pytest.param((None,), 2, {"ends": (44,), "penalty": 0.0, "early": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_texts_and_scores_are_those_of_a_search_in_lists(windows, beams, options, monkeypatch):
    # With room for few steps, the cache is put in order again and again.
    monkeypatch.setattr(beam, "_STEPS", 3)
    monkeypatch.setattr(beam, "capacity", lambda slots: slots)
    model = talking_model(windows=windows)
    best = beam_search(
        model,
        PROMPTS,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=10,
        length_penalty=options.get("penalty", 1.0),
        early_stopping=options.get("early", False),
        eos_id=options.get("ends"),
    )
    assert best.tokens.dtype == best.lengths.dtype == jnp.int32
    assert best.tokens.shape == (3, beams, 10)
    assert_found(best, [searched_by_hand(model, prompt, beams, 10, **options) for prompt in PROMPTS])
    # Only a penalty that favours long texts leaves out those that end early.
    assert (best.lengths.min() < 10) == ("ends" in options and options.get("penalty", 1) <= 1)
    for row, length in zip(np.asarray(best.tokens).reshape(-1, 10), np.asarray(best.lengths).reshape(-1), strict=True):
        assert (row[length:] == row[length - 1]).all()


@pytest.mark.slow
def test_one_beam_is_greedy():
    model = talking_model()
    best = beam_search(model, PROMPTS, num_beams=1, max_new_tokens=24)
    assert best.tokens[:, 0].tolist() == generate(model, PROMPTS, max_new_tokens=24).tokens.tolist()


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=16), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    ends=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=2, unique=True),
    early=st.sampled_from([True, False, "never"]),
    penalty=st.sampled_from([0.6, 1.0, 2.0]),
)
@pytest.mark.slow
def test_a_prompt_gives_what_it_gives_alone_in_any_order(rows, order, ends, early, penalty):
    model = talking_model()

    def found(rows):
        return texts(
            beam_search(
                model,
                rows,
                num_beams=3,
                num_return_sequences=3,
                max_new_tokens=9,
                length_penalty=penalty,
                early_stopping=early,
                eos_id=ends,
            )
        )

    together = found(rows)
    for expected, row in zip(together, rows, strict=True):
        ((*alone,),) = found([row])
        assert [text for text, _ in alone] == [text for text, _ in expected]
        np.testing.assert_allclose([score for _, score in alone], [score for _, score in expected], rtol=1e-5)
    again = found([rows[index] for index in order])
    assert [[text for text, _ in row] for row in again] == [[text for text, _ in together[index]] for index in order]


def test_trap_scores_multiplied_as_probabilities():
    """After 24 tokens of a vocabulary of 61, products would be about 1e-30; here they are sums of logarithms."""
    model = talking_model()
    best = beam_search(model, PROMPTS, num_beams=3, num_return_sequences=3, max_new_tokens=24, length_penalty=0.5)
    for prompt, found in zip(PROMPTS, texts(best), strict=True):
        for text, score in found:
            assert score == pytest.approx(score_of(model, prompt, text) / 24**0.5, rel=1e-5)


@pytest.mark.slow
def test_trap_hard_coded_5():
    model = talking_model(windows=(None,))
    for beams, returned in ((2, 2), (7, 3)):
        best = beam_search(
            model, PROMPTS[:1], num_beams=beams, num_return_sequences=returned, max_new_tokens=5, eos_id=[3]
        )
        assert best.tokens.shape == (1, returned, 5)
        assert len({tuple(text) for text, _ in texts(best)[0]}) == returned
        assert (np.diff(best.scores[0]) <= 0).all()


@pytest.mark.slow
def test_trap_dead_eos_check():
    model = talking_model()
    (free,) = texts(beam_search(model, PROMPTS[:1], num_beams=2, max_new_tokens=12))
    end = free[0][0][4]
    best = beam_search(
        model, PROMPTS[:1], num_beams=2, num_return_sequences=2, max_new_tokens=12, length_penalty=-1.0, eos_id=end
    )
    ended = [text for text, _ in texts(best)[0] if len(text) < 12]
    assert ended
    for text in ended:
        assert text.index(end) == len(text) - 1


def test_trap_one_forward_a_beam(monkeypatch):
    calls = []

    def spied(forward):
        def called(model, ids, *arguments):
            calls.append(ids.shape)
            return forward(model, ids, *arguments)

        return called

    for name in ("prefill", "hidden"):
        monkeypatch.setattr(Mistral, name, spied(getattr(Mistral, name)))
    model = talking_model(windows=(None,), kv_heads=1)
    beam_search(model, PROMPTS, num_beams=6, max_new_tokens=4)
    # Traced twice: the prompts, each once, and a step, all beams of a prompt at once.
    assert calls == [(3, 16), (3, 6)]


def test_trap_no_length_penalty():
    model, lengths = talking_model(), {}
    for penalty in (-2.0, 4.0):
        best = beam_search(
            model,
            PROMPTS,
            num_beams=4,
            max_new_tokens=16,
            length_penalty=penalty,
            early_stopping="never",
            eos_id=[5, 44],
        )
        lengths[penalty] = np.asarray(best.lengths)
    assert (lengths[-2.0] < lengths[4.0]).all()


def test_trap_list_of_caches_aliased_between_beams():
    """Beams share slots, and none sees what another one wrote: each text's score is what the text has alone."""
    model = talking_model()
    best = beam_search(model, PROMPTS[:1], num_beams=8, num_return_sequences=8, max_new_tokens=20)
    found = texts(best)[0]
    for (text, _), (other, _) in itertools.pairwise(found):
        assert text != other
    for text, score in found:
        assert score == pytest.approx(score_of(model, PROMPTS[0], text) / 20, rel=1e-5)


@pytest.mark.slow
def test_as_many_beams_as_tokens_and_nothing_but_ends():
    model = talking_model(windows=(None,), vocab=3)
    for ends in ([], [0], [0, 1], [0, 1, 2], [2, 2]):
        best = beam_search(model, [[1, 2]], num_beams=3, num_return_sequences=3, max_new_tokens=4, eos_id=ends)
        assert_found(best, [searched_by_hand(model, [1, 2], 3, 4, ends=ends)])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.slow
def test_16_bit_models(dtype):
    model = talking_model(windows=(None,), dtype=dtype)
    best = beam_search(model, PROMPTS, num_beams=4, num_return_sequences=2, max_new_tokens=8)
    assert best.scores.dtype == jnp.float32
    for prompt, found in zip(PROMPTS, texts(best), strict=True):
        for text, score in found:
            assert score == pytest.approx(score_of(model, prompt, text) / 8, rel=0.03)


@pytest.mark.long
def test_the_cache_grows_with_the_text_and_not_with_the_beams(monkeypatch):
    monkeypatch.setattr(beam, "_STEPS", 4)
    monkeypatch.setattr(beam, "capacity", lambda slots: slots)
    sizes, extend = [], beam.extend

    def spied(kept, cache):
        sizes.append((int(kept[1].step), cache.kv_seq))
        return extend(kept, cache)

    monkeypatch.setattr(beam, "extend", spied)
    model = talking_model(windows=(None,))
    best = beam_search(model, PROMPTS[:1], num_beams=5, max_new_tokens=90)
    assert sizes[0] == (1, 32)
    assert sizes[-1][1] < 2 * (len(PROMPTS[0]) + 90)
    # Few sizes, each of which is compiled for.
    assert len({size for _, size in sizes}) <= 6
    # What was moved is still what it was: the score is that of the text.
    (found,) = texts(best)
    assert found[0][1] == pytest.approx(score_of(model, PROMPTS[0], found[0][0]) / 90, rel=1e-5)
    sizes.clear()
    beam_search(talking_model(windows=(7,)), PROMPTS[:1], num_beams=5, max_new_tokens=90)
    assert max(size for _, size in sizes) <= 64


def test_other_values_compile_nothing_anew():
    model = talking_model(windows=(None,), q_per_kv=1)

    def search(prompts, **options):
        beam_search(model, prompts, num_beams=3, **options)

    search(random_prompts(5, 9), max_new_tokens=8, eos_id=4)
    with count_compilations() as compiled:
        search(random_prompts(3, 16), max_new_tokens=11, eos_id=7, length_penalty=0.3, early_stopping="never")
        search(random_prompts(1, 2), max_new_tokens=4, eos_id=7, early_stopping=True, num_return_sequences=2)
    assert not {"read_chunk", "extend", "_first", "put_in_order", "live_slots"} & set(compiled)


NAMED = {
    "heads": (mx.HEADS, {"tp": 2}),
    "head_dim": (mx.HEAD_DIM, {"tp": 2}),
    "kv_replicated": (mx.KV_REPLICATED, {"kv": 2, "rep": 3}),
    "heads_x_kv_seq": (mx.HEADS_X_KV_SEQ, {"kv": 2, "rep": 3}),
    "sequence_parallel": (mx.SEQUENCE_PARALLEL, {"tp": 2}),
    "heads, batch over 2": (mx.HEADS + "batch@dp", {"dp": 2, "tp": 2}),
}


def search_on(*place):
    """A search on one device, or with a strategy on several; each device puts its part of the cache in order.

    In float64, where no two sums are so close that another order of additions exchanges them.
    """
    with precision("float64"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam, "_STEPS", 3)
        patch.setattr(beam, "capacity", lambda slots: slots)
        config = dataclasses.replace(talking_model(windows=(7,)).config, vocab=66, hidden=42)
        model = random_model(config, "float64")
        model = on(model, *place) if place else model
        return beam_search(model, PROMPTS, num_beams=4, num_return_sequences=4, max_new_tokens=10, eos_id=[5, 44])


@pytest.fixture(scope="module")
def on_one_device():
    return search_on()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks={"heads": (), "heads_x_kv_seq": pytest.mark.slow}.get(name, pytest.mark.long))
        for name in NAMED
    ],
)
def test_named_strategies_find_the_same(name, on_one_device):
    """Three prompts also where the batch is split in two."""
    found = search_on(*NAMED[name])
    np.testing.assert_array_equal(found.tokens, on_one_device.tokens)
    np.testing.assert_array_equal(found.lengths, on_one_device.lengths)
    np.testing.assert_allclose(found.scores, on_one_device.scores, rtol=1e-10)


def _loop(dtype, batch=2, beams=3):
    """The arguments of a loop."""
    cache = Cache.init(CONFIG, batch, KV_SEQ, dtype)
    none = jnp.zeros(batch, jnp.int32)
    search = beam.Search.init(none, none > 0, beams, 64, KV_SEQ)
    rules = beam.Rules.init(np.array([3]), 64, 64, 1.0, False)
    return (small_model(config=CONFIG, dtype=dtype), search, rules, np.asarray(9, np.int32)), cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_step_does_nothing_with_a_whole_cache_but_update_and_contract_it(dtype):
    kept, cache = _loop(dtype)
    shape = cache.layers[0].k_buffer.numbers.shape
    compiled = beam.extend.lower(kept, cache).compile().compiled
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    text, entries, updates = compiled.as_text(), math.prod(shape), 0
    computations = _computations(text)
    for operation, result, line in _instructions(text):
        size = math.prod(int(axis) for axis in re.search(r"\[([\d,]*)\]", result)[1].split(",") if axis)
        if size < entries or operation in ("parameter", "get-tuple-element", "tuple", "while", "bitcast"):
            continue
        root = operation
        if operation == "fusion":
            (root_line,) = [one for one in computations[re.search(r"calls=%?([\w.-]+)", line)[1]] if "ROOT" in one]
            root = re.search(r"= \S+ ([\w-]+)\(", root_line)[1]
        if root == "dynamic-update-slice":
            updates += 1
        else:
            # The bits of one layer's 16-bit keys or values, as floats.
            assert (dtype, result.split("[")[0], root) == ("bfloat16", "bf16", "bitcast"), line
    assert updates == 2 * CONFIG.layers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 0}, ["num_beams is 0", "at least 1"]),
        ({"num_beams": 2.5}, ["num_beams is 2.5", "whole number"]),
        ({"num_beams": VOCAB + 1}, [f"num_beams is {VOCAB + 1}", f"{VOCAB} tokens"]),
        ({"num_return_sequences": 5}, ["num_return_sequences is 5", "at most num_beams, 4"]),
        ({"num_return_sequences": 1.5}, ["num_return_sequences is 1.5"]),
        ({"num_return_sequences": 0}, ["num_return_sequences is 0"]),
        ({"early_stopping": "always"}, ["early_stopping is 'always'", "True, False, 'never'"]),
        ({"early_stopping": 1}, ["early_stopping is 1"]),
        ({"length_penalty": math.inf}, ["length_penalty is inf", "finite"]),
        ({"length_penalty": math.nan}, ["length_penalty is nan", "finite"]),
        ({"length_penalty": 1000.0}, ["length_penalty is 1000.0", "float32"]),
        ({"max_new_tokens": 0}, ["max_new_tokens is 0"]),
        ({"eos_id": VOCAB}, [f"end token {VOCAB}"]),
        ({"prompts": [[]]}, ["Prompt 0 is empty"]),
        ({"prompts": []}, ["no prompt"]),
        ({"max_new_tokens": 5000}, ["context of 4096"]),
    ],
    ids=str,
)
def test_bad_input(options, words):
    options = {"prompts": PROMPTS, "num_beams": 4, "max_new_tokens": 4} | options
    with refused(*words):
        beam_search(talking_model(), options.pop("prompts"), **options)


@pytest.mark.slow
def test_the_page_and_the_example(tmp_path, capsys):
    path, root = save_tiny_model(tmp_path / "model", max_positions=1024), Path(__file__).parents[1]
    (snippet,) = re.findall(r"```python\n(.*?)```", (root / "docs/beam_search.md").read_text(), flags=re.DOTALL)
    exec(compile(snippet.replace('"smollm2-135m"', repr(str(path))), "beam_search.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 4
    runpy.run_path(str(root / "examples/beam_search.py"))["main"](str(path))
    assert capsys.readouterr().out.count("length penalty") == 2
