"""`mistral-eqx train`: recipes, and what is wrong with them."""

import csv
import json
import re
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.cli import assert_refused, run, save_tiny_model
from fixtures.trainer import keep_programs as keep_programs

import mistral_eqx as mx
from mistral_eqx.cli.recipe import read_recipe
from mistral_eqx.cli.training import Sets, make_trainer
from mistral_eqx.train import data


ROOT = Path(__file__).parents[1]
SORT = """
folder = "{folder}"

[model]
name = "gpt-nano"
config = {{layers = 1, embed = 16, hidden = 32}}

[data]
kind = "sort"
options = {{length = 3, symbols = 4}}
rows = 8

[optimizer]
learning_rate = 1e-2

[training]
steps = 6
compute_dtype = "float32"
remat = "none"
save_every = 2
evaluate_every = 3
log_every = 1
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setattr("mistral_eqx.cli.loading._keep_compiled_programs", lambda: None)
    # Precision would be a setting of the whole process too.
    monkeypatch.setattr("mistral_eqx.cli.loading._multiply_as_stored", lambda model: None)
    monkeypatch.setenv("MISTRAL_EQX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(SORT.format(folder=tmp_path / "run"))
    return path


def changed(*entries):
    return [option for entry in entries for option in ("--set", entry)]


def figures(folder, name="training"):
    with (folder / f"{name}.csv").open() as file:
        return [(int(line["step"]), line["loss"]) for line in csv.DictReader(file)]


def test_a_recipe_is_trained_and_goes_on(recipe, tmp_path):
    """What stops after three steps and goes on with other steps is the run that does not stop, to the digit."""
    schedule = changed('optimizer.schedule="constant"')
    whole = run("train", recipe, "--folder", tmp_path / "whole", *schedule)
    assert whole.exit_code == 0, whole.stderr
    assert re.fullmatch(r"\d+ of 12 held-out problems are solved\n", whole.stdout)
    said = whole.stderr.splitlines()
    assert said[0] == "4,784 weights, 6 steps of 8 rows of 5 tokens"
    assert [line.split(",")[0] for line in said[1:3]] == ["training: step 6", "evaluation: step 6"]
    assert said[3] == f"Saved to {tmp_path / 'whole' / 'model'}"
    first = run("train", recipe, "--steps", 3, *schedule)
    assert first.exit_code == 0, first.stderr
    assert [step for step, _ in figures(tmp_path / "run")] == [1, 2, 3]
    again = run("train", recipe, *schedule)
    assert (again.exit_code, again.stdout) == (0, whole.stdout)
    assert "The run continues after step 3.\n" in again.stderr
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert figures(tmp_path / "run", "evaluation") == figures(tmp_path / "whole", "evaluation")
    models = [mx.load(tmp_path / name / "model") for name in ("whole", "run")]
    assert models[0].config.vocab == 4
    np.testing.assert_array_equal(models[0].norm.weight, models[1].norm.weight)
    held_out = data.Sort(3, 4, held_out=True)
    out = mx.generate(models[1], held_out.prompts, max_new_tokens=3)
    right = int((out.tokens == jnp.asarray(held_out.answers)).all(axis=1).sum())
    assert again.stdout.startswith(f"{right} of ")


@pytest.mark.long
def test_texts_with_the_tokenizer_of_a_model(recipe, tiny, tmp_path):
    """On a mesh, under ZeRO, with samples: what is saved has the tokenizer and its end token."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n\n" * 8)
    texts = (
        'data.kind="text"',
        "data.path=text.txt",
        r'data.separator="\n\n"',
        f"data.tokenizer={tiny}",
        "data.seq=16",
    )
    more = ("data.options={}", "data.held_out=text.txt", 'training.samples=["To be"]', "training.zero=3")
    others = ("training.steps=3", "training.remat=block", "training.keep_best=true", "data.objective=prefix_lm")
    options = ("--mesh", "dp=2,tp=2", "--strategy", "hidden@tp batch@dp")
    result = run("train", recipe, *changed(*texts, *more, *others), *options)
    assert result.exit_code == 0, result.stderr
    assert ", hidden@tp batch@dp on dp=2,tp=2" in result.stderr
    # Before the first step and after the last one, which is an evaluation as well.
    assert result.stdout.count("To be") >= 2
    saved = tmp_path / "run/model"
    assert mx.load_tokenizer(saved).encode("To be") == mx.load_tokenizer(tiny).encode("To be")
    model = mx.load(saved)
    assert (model.config.vocab, model.config.bos_id, model.config.eos_ids) == (260, 0, (1,))
    assert (tmp_path / "run/best").is_dir()
    assert len(list((tmp_path / "run/tokens").iterdir())) == 1


@pytest.mark.slow
def test_a_run_keeps_its_state_on_disk(recipe, tmp_path):
    on_disk = changed("training.offload=disk", "training.dtype=bfloat16", 'optimizer.schedule="constant"')
    for steps in (3, 6):
        result = run("train", recipe, *on_disk, "--steps", steps)
        assert result.exit_code == 0, result.stderr
    assert "The run continues after step 3.\n" in result.stderr
    assert [step for step, _ in figures(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert mx.load(tmp_path / "run/model").dtype == "bfloat16"
    refused = run("train", recipe)
    assert refused.exit_code == 2
    assert "keeps its state in files of offload='disk'; continue with it" in refused.stderr


@pytest.mark.slow
def test_a_pipeline_saves_a_model_of_all_layers(recipe, tmp_path):
    more = ("model.config.layers=2", "training.accumulate=2", "training.schedule=1f1b", "training.steps=2")
    result = run("train", recipe, *changed(*more), "--mesh", "pp=2", "--strategy", "layers@pp")
    assert result.exit_code == 0, result.stderr
    assert ", layers@pp on pp=2" in result.stderr
    assert mx.load(tmp_path / "run/model").config.layers == 2


@pytest.mark.long
def test_a_pipeline_reads_weights_into_its_stages_and_writes_them_from_there(recipe, tiny, tmp_path, monkeypatch):
    for name in ("cli.loading.load", "nn.unstack", "train.step.unstack"):
        monkeypatch.setattr(f"mistral_eqx.{name}", None)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n\n" * 8)
    text = recipe.read_text().replace("config = {layers = 1, embed = 16, hidden = 32}", "weights = true")
    recipe.write_text(text.replace("options = {length = 3, symbols = 4}", 'path = "text.txt"\nseq = 16'))
    more = (f"model.name={tiny}", "data.kind=text", "training.accumulate=2", "training.steps=2")
    result = run("train", recipe, *changed(*more), "--mesh", "pp=2,tp=2", "--strategy", "heads layers@pp")
    assert result.exit_code == 0, result.stderr
    before, after = (mx.load(path) for path in (tiny, tmp_path / "run/model"))
    for block, other in zip(before.blocks, after.blocks, strict=True):
        moved = np.abs(np.asarray(block.attention.q_proj.weight.value - other.attention.q_proj.weight.value))
        # Two steps of AdamW with this rate or a smaller one.
        assert 0 < moved.max() < 2.1e-2


@pytest.mark.slow
def test_quantized_weights_are_expanded(recipe, tiny, tmp_path):
    small = tmp_path / "small"
    assert run("quantize", tiny, small, "--block-size", 16).exit_code == 0
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n\n" * 8)
    text = recipe.read_text().replace("config = {layers = 1, embed = 16, hidden = 32}", "weights = true")
    recipe.write_text(text.replace("options = {length = 3, symbols = 4}", 'path = "text.txt"\nseq = 16'))
    result = run("train", recipe, *changed(f"model.name={small}", "data.kind=text", "training.steps=2"))
    assert result.exit_code == 0, result.stderr
    before, after = mx.load(small, dtype="float32"), mx.load(tmp_path / "run/model")
    assert not np.array_equal(
        before.blocks[0].attention.q_proj.weight.value, after.blocks[0].attention.q_proj.weight.value
    )


@pytest.mark.slow
def test_a_conversation_teaches_adapters(recipe, tiny, tmp_path):
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Aye"}]
    (tmp_path / "talks.jsonl").write_text(f"{json.dumps({'messages': talk})}\n" * 8)
    text = recipe.read_text().replace("config = {layers = 1, embed = 16, hidden = 32}", "weights = true")
    recipe.write_text(text.replace("options = {length = 3, symbols = 4}", 'path = "talks.jsonl"\nseq = 64'))
    lora = ("lora.rank=2", "lora.alpha=4.0", "lora.dropout=0.1")
    result = run("train", recipe, *changed(f"model.name={tiny}", "data.kind=chat", "training.steps=4", *lora))
    assert result.exit_code == 0, result.stderr
    losses = [float(loss) for _, loss in figures(tmp_path / "run")]
    assert losses[-1] < losses[0]
    model = mx.load(tiny)
    tuned = mx.load_lora(model, tmp_path / "run/adapters")
    ids = jnp.asarray([mx.load_tokenizer(tiny).encode("Hello")])
    assert not np.array_equal(tuned(ids), model(ids))
    assert not (tmp_path / "run/model").exists()


@pytest.mark.slow
def test_a_larger_vocabulary_is_kept(recipe, tmp_path):
    characters = ("data.kind=characters", "data.path=text.txt", "data.options={}", "data.seq=8", "training.steps=1")
    (tmp_path / "text.txt").write_text("abcdefgh " * 40)
    result = run("train", recipe, *changed(*characters, "model.config.vocab=16"))
    assert result.exit_code == 0, result.stderr
    assert mx.load(tmp_path / "run/model").config.vocab == 16
    result = run("train", recipe, *changed(*characters, "model.config.vocab=5"))
    assert_refused(result, "vocab of 5", "9 tokens")


def test_flags_take_texts_as_they_are(recipe, tmp_path):
    folder = tmp_path / 'a "quoted" \\ name'
    result = run("train", recipe, "--folder", folder, "--steps", 1)
    assert result.exit_code == 0, result.stderr
    assert (folder / "model").is_dir()


def test_gradients_are_not_clipped_where_clip_is_zero(recipe):
    def clips(*entries):
        return make_trainer(read_recipe(recipe, entries), Sets(None, None, None, 6), None, (0, 1)).clip

    assert clips() == 1.0
    assert clips("training.clip=0") is None
    assert clips("training.clip=0.5") == 0.5


def test_products_have_the_type_that_is_asked_for_whatever_the_weights_have(recipe):
    def cast(*entries):
        return make_trainer(read_recipe(recipe, entries), Sets(None, None, None, 6), None, (0, 1)).compute_dtype

    assert cast() is None
    assert cast("training.dtype=bfloat16") == "float32"
    assert cast("training.compute_dtype=bfloat16") == "bfloat16"


@pytest.mark.parametrize("path", sorted((ROOT / "examples/recipes").iterdir()), ids=lambda path: path.stem)
def test_the_recipes_can_be_read(path):
    read_recipe(path, []).check()
    document = tomllib.loads(path.read_text())
    if "path" in document["data"]:
        assert (path.parent / document["data"]["path"]).is_file()
    assert f"mistral-eqx train {path.relative_to(ROOT)}" in path.read_text()


MASKED = ("data.kind=text", "data.options={}", "data.path=recipe.toml", "data.seq=16", "data.objective=bert_mask")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["training.step=3"], ["'training.step'", "'training.steps'"]),
        (["model.colour=red"], ["'model.colour'", "name, weights, config, seed"]),
        (["training.steps=many"], ["'training.steps'", "'many'", "a whole number"]),
        (["training.steps=true"], ["'training.steps'", "True"]),
        (["training.samples=[1]"], ["'training.samples'", "its entry 0 must be a text"]),
        (["data.path=3"], ["'data.path'", "a text or a list"]),
        (["data=3"], ["'data'", "a table"]),
        (["data.rows"], ["--set 'data.rows'", "--set training.steps=100"]),
        (["folder.name=a"], ["'folder'", "no table"]),
        (["model.name=gpt-pico"], ["'gpt-pico'", "gpt-nano"]),
        (["model.config.depth=2"], ["'depth'", "layers"]),
        (["model.config.eos_ids=[2]"], ["'eos_ids'", "cannot be set"]),
        (["model.config.layers=two"], ["'model.config.layers'", "a whole number"]),
        (["model.config.layers=0"], ["'model.config.layers' is 0"]),
        (["model.weights=true"], ["'model.config'", "'model.weights'"]),
        (["data.kind=sorted"], ["'data.kind'", "'sorted'", "characters"]),
        (["data.options.digits=2"], ["'data.options'", "'digits'", "length, symbols, seed"]),
        (["data.options.held_out=true"], ["'held_out'"]),
        (["data.options.length=long"], ["'data.options.length'", "a whole number"]),
        (["data.separator=x"], ["'data.separator'", "'sort'", "text"]),
        (["data.kind=text", "data.options={}"], ["'data.seq'"]),
        (["data.kind=text", "data.options={}", "data.seq=8"], ["'data.path'"]),
        (["data.kind=characters", "data.options={}", "data.seq=8", "data.path=none.txt"], ["none.txt", "no file"]),
        (["data.kind=characters", "data.options={}", "data.seq=8", "data.path=bytes"], ["bytes", "not UTF-8"]),
        ([*MASKED], ["tokenizer", "'data.tokenizer'"]),
        (["optimizer.schedule=linear"], ["'optimizer.schedule'", "'linear'", "wsd"]),
        (["optimizer.decay=3"], ["'optimizer.decay'", "'cosine'"]),
        (["optimizer.warmup=6"], ["'optimizer.warmup' is 6", "6 steps", "--set optimizer.warmup=1"]),
        (["optimizer.schedule=wsd", "optimizer.decay=7"], ["'optimizer.decay' is 7", "--set optimizer.decay=1"]),
        (["optimizer.schedule=wsd", "optimizer.warmup=4", "optimizer.decay=3"], ["--set optimizer.warmup=0"]),
        (["training.clip=-1"], ["'training.clip' is -1", "at least 0"]),
        (["training.compute_dtype=int8"], ["'training.compute_dtype'", "'int8'", "bfloat16"]),
        (["training.remat=all"], ["'training.remat'", "'all'", "block"]),
        (["training.samples=['a']"], ["'training.samples'", "'sort'"]),
        (["training.save_every=0"], ["'training.save_every' is 0"]),
        (["devices.strategy=tensor"], ["'tensor'"]),
    ],
)
def test_what_is_wrong_is_one_sentence(recipe, tmp_path, entries, words):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert_refused(run("train", recipe, *changed(*entries)), *words)
    assert not list((tmp_path / "run").glob("*/state"))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["data.objective=bert"], ["'data.objective'", "'bert'", "bert_mask"]),
        ([], ["'data.objective_options'", "lack 'mask_id'"]),
        (["data.objective_options={mask_id=2, chance=0.5}"], ["'chance'", "probability"]),
        (["data.objective_options={mask_id='x'}"], ["'data.objective_options.mask_id'", "a whole number"]),
        (["data.objective=causal", "data.objective_options={mask_id=2}"], ["'mask_id'", "none"]),
        (["data.objective=replace_spans", "data.seq=4"], ["4 columns", "replace_spans"]),
        (["data.objective_options={mask_id=1000000}"], ["'data.objective_options.mask_id'", "1000000", "below"]),
        (["data.objective=replace_spans", "data.objective_options={sentinels=[3, 9999]}"], [".sentinels'", "9999"]),
        (["training.keep_best=true", "data.objective_options={mask_id=2}"], ["'keep_best'", "'data.held_out'"]),
    ],
)
def test_an_objective_is_refused_before_training(recipe, tiny, entries, words):
    assert_refused(run("train", recipe, *changed(*MASKED, f"data.tokenizer={tiny}", *entries)), *words)


def test_files_that_are_no_recipes(recipe, tmp_path):
    assert_refused(run("train", tmp_path / "missing.toml"), "missing.toml cannot be used: No such file")
    whole = recipe.read_text()
    recipe.write_text(whole.replace("rows = 8", ""))
    assert_refused(run("train", recipe), "lacks 'data.rows'", "--set data.rows=")
    recipe.write_text("folder = \n")
    assert_refused(run("train", recipe), "recipe.toml' is not valid TOML", "line 1")
    recipe.write_bytes(b"\xff")
    assert_refused(run("train", recipe), "recipe.toml' is not UTF-8 text")
