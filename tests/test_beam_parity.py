"""The same texts and scores as transformers'.

`BEAM_PROMPTS=20 pytest -m parity -s tests/test_beam_parity.py -k smollm2` makes the whole table for SmolLM2: 20 prompts
with 2, 4, 5 and 8 beams and three penalties, which takes ten minutes. Without it three prompts are searched.
"""

import itertools
import os

import numpy as np
import pytest
from fixtures.generation import VOCAB, talking_model

import mistral_eqx as mx


pytestmark = pytest.mark.parity

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "Q: What is the boiling point of water?\nA:",
    "Dear Sir or Madam,",
    "1, 1, 2, 3, 5, 8,",
    "« Liberté, égalité,",
    "Photosynthesis is the process by which",
    "My grandmother's recipe for apple cake begins with",
    "The largest planet of the solar system",
    "To be, or not to be:",
    "In 1969, Neil Armstrong",
    "SELECT name, age FROM",
    "The opposite of hot is",
    "She opened the old wooden door and",
    "Water consists of",
    "The best way to learn a language is",
    "<html>\n<head>\n",
    "Shakespeare wrote",
)


@pytest.fixture(scope="module")
def transformers():
    torch = pytest.importorskip("torch")
    # Torch's threads wait for each other without rest: where other programs run too, two are ten times as slow as one.
    torch.set_num_threads(1)
    return pytest.importorskip("transformers")


def loaded(transformers, model, folder):
    mx.save(model, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return theirs


def searched(theirs, prompts, *, ends, returned, **options):
    """Texts and scores of a padded batch; what they repeat behind an end is cut off."""
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    out = theirs.generate(
        ids,
        attention_mask=mask,
        num_return_sequences=returned,
        eos_token_id=list(ends) or None,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    texts = []
    for row in out.sequences[:, width:].tolist():
        length = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        texts.append(row[:length])
    return texts, out.sequences_scores.numpy()


def found(ours, prompts, *, ends, returned, **options):
    best = mx.beam_search(ours, prompts, num_return_sequences=returned, eos_id=ends, **options)
    tokens = np.asarray(best.tokens).reshape(-1, best.tokens.shape[-1])
    lengths = np.asarray(best.lengths).reshape(-1)
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)], np.asarray(best.scores).ravel()


@pytest.mark.parametrize(
    ("beams", "ends", "batch"), [(2, 1, 1), (3, 0, 2), (4, 3, 3), (5, 1, 2), (6, 2, 1), (8, 1, 3), (8, 0, 1)]
)
def test_random_models(transformers, tmp_path, beams, ends, batch):
    ours = talking_model(windows=(None, None))
    theirs = loaded(transformers, ours, tmp_path / "model")
    draw = np.random.default_rng(beams + ends)
    early = 0
    for penalty, stopping in itertools.product((0.6, 1.0, 2.0, -1.0), (False, True, "never")):
        prompts = [draw.integers(0, VOCAB, length).tolist() for length in draw.integers(1, 17, batch)]
        stops = draw.choice(VOCAB, ends, replace=False).tolist()
        options = {
            "num_beams": beams,
            "max_new_tokens": int(draw.integers(1, 30)),
            "length_penalty": penalty,
            "early_stopping": stopping,
            "returned": int(draw.integers(1, beams + 1)),
            "ends": stops,
        }
        texts, scores = found(ours, prompts, **options)
        expected, expected_scores = searched(theirs, prompts, **options)
        assert texts == expected, (prompts, options)
        np.testing.assert_allclose(scores, expected_scores, rtol=2e-5)
        early += sum(len(text) < options["max_new_tokens"] for text in texts)
    assert ends == 0 or early > 0


def test_smollm2(transformers, smollm2_path, tmp_path):
    ours = mx.load(smollm2_path, dtype="float32")
    theirs = loaded(transformers, ours, tmp_path / "model")
    tokenizer = mx.load_tokenizer(smollm2_path)
    number = int(os.environ.get("BEAM_PROMPTS", "0"))
    settings = list(itertools.product((2, 4, 5, 8), (0.6, 1.0, 2.0))) if number else [(5, 0.6), (5, 1.0), (5, 2.0)]
    # A full stop ends a text too: one that goes on for 24 tokens would rarely end.
    ends = sorted({*tokenizer.eos_ids, *tokenizer.encode(".", add_bos=False)})
    for at, (beams, penalty) in enumerate(settings):
        ended = 0
        for turn, prompt in enumerate(PROMPTS[:number] or PROMPTS[at : at + 1], at):
            options = {
                "num_beams": beams,
                "max_new_tokens": 24,
                "length_penalty": penalty,
                "early_stopping": (False, True, "never")[turn % 3],
                "returned": beams,
                "ends": ends,
            }
            texts, scores = found(ours, [tokenizer.encode(prompt)], **options)
            expected, expected_scores = searched(theirs, [tokenizer.encode(prompt)], **options)
            assert texts == expected, (prompt, options)
            np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)
            ended += sum(len(text) < 24 for text in texts)
        if number:
            line = f"{beams} beams, penalty {penalty}: {number} prompts equal, {ended} of their texts ended early"
            print(line, flush=True)  # noqa: T201  (the table)
