"""The harness gets from the adapter what it gets from its own class for transformers, on the same small model."""

import importlib
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.cli import save_tiny_model
from fixtures.model import small_model

import mistral_eqx as mx


TASKS = Path(__file__).parent / "fixtures" / "harness"
NAMES = ["whale_choice", "whale_continuation", "whale_rolling"]


def test_without_the_extra_one_sentence_says_so(monkeypatch):
    monkeypatch.delitem(sys.modules, "mistral_eqx.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"not installed; run pip install 'mistral-eqx\[eval\]'\.$"):
        importlib.import_module("mistral_eqx.evaluate.harness")


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory):
    pytest.importorskip("torch").set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        # What other people's packages warn of is not this suite's.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("lm_eval.tasks")
            yield pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that is surer of some letters than of others, with 64 positions, as transformers reads it."""
    root = tmp_path_factory.mktemp("model")
    first = save_tiny_model(root / "first", max_positions=64)
    mx.save(small_model(config=mx.load(first).config), root / "model")
    mx.load_tokenizer(first).save(root / "model")
    return root / "model"


def evaluated(lm_eval, tmp_path, model, **options):
    for file in TASKS.iterdir():
        shutil.copy(file, tmp_path)
    for file in tmp_path.glob("*.yaml"):
        file.write_text(file.read_text().replace("FOLDER", str(tmp_path)))
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=NAMES, task_manager=manager, bootstrap_iters=0, **options)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_figures_are_those_of_the_class_for_transformers(lm_eval, folder, tmp_path):
    from lm_eval.models.huggingface import HFLM

    from mistral_eqx.evaluate.harness import Harness

    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3, max_length=64)
    ours = Harness(mx.load(folder), mx.load_tokenizer(folder), batch=3, render_chat=mx.render_chat)
    # Both put a token for the beginning before a text.
    assert theirs.tok_encode("The") == ours.tok_encode("The") == mx.load_tokenizer(folder).encode("The", add_bos=True)
    for options in ({}, {"num_fewshot": 0, "apply_chat_template": True}):
        expected, found = (evaluated(lm_eval, tmp_path, model, **options) for model in (theirs, ours))
        for name in NAMES:
            for one, other in zip(found["samples"][name], expected["samples"][name], strict=True):
                assert one["doc_id"] == other["doc_id"]
                if name == "whale_continuation":
                    assert one["resps"] == other["resps"]
                else:
                    # Sums of up to 100 tokens' log-probabilities in float32.
                    np.testing.assert_allclose(
                        np.float64(one["filtered_resps"]), np.float64(other["filtered_resps"]), rtol=1e-5
                    )
            for metric, value in expected["results"][name].items():
                if isinstance(value, float):
                    assert found["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
    answers = {text for one in found["samples"]["whale_continuation"] for (text,) in one["resps"]}
    assert len(answers) > 1


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_texts_that_are_drawn_and_options_that_are_refused(lm_eval, folder):
    from mistral_eqx.evaluate.harness import Harness

    model, tokenizer = mx.load(folder), mx.load_tokenizer(folder)

    def drawn(texts, *, batch, seed=0, **options):
        options = {"until": ["\n"], "max_gen_toks": 16, **options}
        requests = [SimpleNamespace(args=(text, options)) for text in texts]
        return Harness(model, tokenizer, batch=batch, seed=seed).generate_until(requests)

    texts = ["Call me", "", "The whale is as white as"]
    warm = {"do_sample": True, "temperature": 3.0, "top_k": 50}
    assert drawn(texts, batch=1, **warm) == drawn(texts, batch=3, **warm)
    assert drawn(texts, batch=3, **warm) != drawn(texts, batch=3, seed=1, **warm)
    assert drawn(texts, batch=3) == drawn(texts, batch=3, do_sample=False, seed=1)
    # A context that is too long loses its beginning.
    assert drawn(["x" * 100 + "Call me Ishmael" * 4], batch=1) == drawn(["Call me Ishmael" * 4], batch=1)
    with pytest.raises(ValueError, match=r"num_beams=4 in its generation_kwargs.*\.$"):
        drawn(texts, batch=1, num_beams=4)
    with pytest.raises(ValueError, match=r"max_gen_toks is 64, and a text may have 64 tokens.*\.$"):
        drawn(texts, batch=1, max_gen_toks=64)
    with pytest.raises(ValueError, match=r"give render_chat=mistral_eqx.render_chat\.$"):
        Harness(model, tokenizer).apply_chat_template([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match=r"max_length is 65; it must be from 1 to this model's context of 64\.$"):
        Harness(model, tokenizer, max_length=65)
    with pytest.raises(ValueError, match=r"batch is 0; it must be at least 1\.$"):
        Harness(model, tokenizer, batch=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_control_token_among_the_stop_strings_ends_a_text(lm_eval, folder):
    from lm_eval.api.instance import Instance

    from mistral_eqx.evaluate.harness import Harness

    model, tokenizer = mx.load(folder), mx.load_tokenizer(folder)
    ours = Harness(model, tokenizer)
    prompt = tokenizer.encode("The", parse_special=True)
    (end,) = tokenizer.encode("<|im_end|>", add_bos=False, parse_special=True)
    bias = mx.LogitBias({end: 1e3})
    request = {"until": ["<|im_end|>"], "max_gen_toks": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mistral_eqx.evaluate.harness._sampler", lambda options: mx.Sampler(processors=[bias]))
        (text,) = ours.generate_until([Instance("generate_until", {}, ("The", request), 0)])
        out = mx.generate(
            model,
            [prompt],
            max_new_tokens=8,
            sampler=mx.Sampler(processors=[bias]),
            stop="<|im_end|>",
            tokenizer=tokenizer,
        )
    assert (text, out.lengths.tolist(), out.texts) == ("", [1], [""])
