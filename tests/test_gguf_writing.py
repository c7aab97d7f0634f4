"""GGUF files that this package writes: read by the package gguf, by this package, and by llama.cpp where it is."""

import dataclasses

import equinox as eqx
import gguf
import jax
import numpy as np
import pytest
from fixtures import llama_quantize
from fixtures.cases import every_third
from fixtures.checkpoint import assert_same_weights, random_model, tiny, write_gguf
from fixtures.cli import assert_refused, run, save_tiny_model
from fixtures.generation import refused
from fixtures.text import tiny as vocabularies

import mistral_eqx as mx
from mistral_eqx.checkpoint.gguf_writing import chosen_types
from mistral_eqx.checkpoint.names import layer_specs
from mistral_eqx.quant import MIXTURES, formats
from mistral_eqx.text.gguf_metadata import byte_level_metadata
from mistral_eqx.text.pre_tokenizers import PRE_TOKENIZERS


TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")
TEXTS = ("a b  c", "Hello wOrld, 12345!", "caf\u00e9\n\n \u5929<think>", "")


@pytest.fixture
def tokenizer(tmp_path):
    return mx.load_tokenizer(vocabularies.write_gguf(tmp_path / "words.gguf", **vocabularies.byte_level_metadata()))


@pytest.fixture
def model(tokenizer, getkey):
    return random_model(tiny(embed=64, hidden=128, head_dim=32, vocab=tokenizer.vocab + 3), getkey())


@pytest.mark.parametrize("type", every_third(TYPES))
def test_a_model_is_written_in_a_type_and_read_again(type, model, tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    mx.save(model, path, format="gguf", type=type, tokenizer=tokenizer)
    again = mx.load(path, dtype="float32")
    assert again.config == dataclasses.replace(model.config, eos_ids=again.config.eos_ids, bos_id=tokenizer.bos_id)
    least = type if type in ("F32", "F16", "BF16") else "Q8_0"
    recipe = {"blocks.*": mx.GGUF(type), "embedding": mx.GGUF(least), "head": mx.GGUF(least)}
    assert_same_weights(again, mx.dequantize(mx.quantize(model, recipe)))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == type
    assert tensors["token_embd.weight"].tensor_type.name == least
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def contents(path):
    """The type of each tensor, and the name of the file's type."""
    reader = gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    return types, gguf.LlamaFileType(reader.fields["general.file_type"].contents()).name


SIZES = {
    "rows of 256": {"embed": 256, "hidden": 256, "layers": 9},
    "rows of 32": {"embed": 96, "hidden": 256, "layers": 8, "q_per_kv": 4, "head_dim": 32},
    "other rows": {"embed": 48, "hidden": 80, "layers": 2},
    "tied": {"embed": 256, "hidden": 256, "layers": 3, "tied": True},
    "tied, rows of 32": {"embed": 32, "hidden": 256, "layers": 3, "tied": True},
}
MANY = {"17 layers": {"embed": 256, "hidden": 256, "layers": 17}}
MANY |= {"80 layers": {"embed": 256, "hidden": 32, "layers": 80, "q_per_kv": 2, "head_dim": 2, "kv_heads": 1}}


@pytest.mark.parity
@pytest.mark.parametrize("sizes", [*SIZES, *(pytest.param(name, marks=pytest.mark.slow) for name in MANY)])
def test_mixtures_are_those_of_llama_quantize(sizes, tmp_path, getkey):
    fields = (SIZES | MANY)[sizes]
    config = tiny(windows=(None,) * fields["layers"], **fields)
    source = write_gguf(tmp_path / "f16.gguf", random_model(config, getkey()), gguf.GGMLQuantizationType.F16)
    for mixture in MIXTURES:
        types = chosen_types(config, mixture, {})
        theirs, _ = contents(llama_quantize.quantize_file(source, tmp_path / "theirs.gguf", mixture))
        assert {spec.name("gguf"): types[spec.path] for spec in layer_specs(config)} == theirs, mixture


def test_a_mixture_in_memory_is_that_of_the_file(tokenizer, tmp_path, getkey):
    model = random_model(tiny(embed=256, hidden=256, vocab=tokenizer.vocab), getkey())
    mx.save(model, tmp_path / "model.gguf", format="gguf", type="Q4_K_M", tokenizer=tokenizer)
    small = mx.quantize(model, {"*": mx.GGUF("Q4_K_M")})
    assert {"Q4_K", "Q6_K"} <= set(formats(small))
    assert contents(tmp_path / "model.gguf")[1] == "MOSTLY_Q4_K_M"
    assert_same_weights(mx.load(tmp_path / "model.gguf"), small)
    blocks_alone = mx.quantize(model, mx.GGUF("Q4_K_M"))
    assert isinstance(blocks_alone.embedding.weight, mx.nn.DenseWeight)
    mx.save(model, tmp_path / "folder")
    assert_same_weights(mx.load(tmp_path / "folder", quantize=mx.GGUF("Q4_K_M")), blocks_alone)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_blocks_are_written_as_they_are(kind, model, tokenizer, tmp_path):
    source = write_gguf(tmp_path / "first.gguf", model, gguf.GGMLQuantizationType[kind])
    kept = mx.load(source)
    mx.save(kept, tmp_path / "second.gguf", format="gguf", tokenizer=tokenizer)
    again = mx.load(tmp_path / "second.gguf")
    for one, other in zip(
        jax.tree.leaves(eqx.filter(again, eqx.is_array)), jax.tree.leaves(eqx.filter(kept, eqx.is_array)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_dtype_expands_what_is_quantized(model, tokenizer, tmp_path):
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    mx.save(model, first, format="gguf", type="Q8_0", tokenizer=tokenizer)
    done = []
    mx.convert(first, second, format="gguf", dtype="float32", progress=lambda *counts: done.append(counts))
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(second).tensors} == {"F32"}
    assert_same_weights(mx.load(second), mx.load(first, dtype="float32"))
    mx.convert(first, second, format="gguf", overwrite=True, progress=lambda *counts: done.append(counts))
    kept, same = (
        {t.name: (t.tensor_type, bytes(t.data)) for t in gguf.GGUFReader(one).tensors} for one in (first, second)
    )
    assert kept == same
    # Kept or expanded, all bytes are counted.
    assert [read for read, total in done].count(done[-1][1]) == 2


def test_a_folder_is_converted_with_its_tokenizer(model, tokenizer, tmp_path):
    mx.save(model, tmp_path / "folder", finish=tokenizer.save)
    result = run("convert", tmp_path / "folder", tmp_path / "model.gguf", "--format", "gguf", "--type", "Q8_0")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith(f"Wrote {tmp_path / 'model.gguf'} (")
    mx.save(model, tmp_path / "other.gguf", format="gguf", type="Q8_0", tokenizer=tokenizer)
    assert_same_weights(mx.load(tmp_path / "model.gguf"), mx.load(tmp_path / "other.gguf"))
    assert not list(tmp_path.glob(".*"))
    again = mx.load_tokenizer(tmp_path / "model.gguf")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_id, again.adds_bos) == (tokenizer.bos_id, tokenizer.adds_bos)
    assert set(tokenizer.eos_ids) <= set(again.eos_ids)
    assert_refused(run("convert", tmp_path / "folder", tmp_path / "model.gguf", "--format", "gguf"), "overwrite")
    assert_refused(run("convert", tmp_path / "folder", tmp_path / "hf", "--type", "Q8_0"), "Q8_0", "'hf'")


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_is_written(prefix, tmp_path, getkey):
    (tmp_path / "tokenizer.model").write_bytes(vocabularies.sentencepiece_model(prefix))
    tokenizer = mx.load_tokenizer(tmp_path / "tokenizer.model")
    model = random_model(tiny(vocab=tokenizer.vocab), getkey())
    mx.save(model, tmp_path / "model.gguf", format="gguf", tokenizer=tokenizer)
    again = mx.load_tokenizer(tmp_path / "model.gguf")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    ids = tokenizer.encode("a b  c")
    assert again.decode(ids) == tokenizer.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers_are_told_apart(pre, smollm2_path):
    """With the merges of a real vocabulary, each name is found again, or another one for the same."""
    base = mx.load_tokenizer(smollm2_path)._tokenizer
    wanted = PRE_TOKENIZERS[pre]
    base.pre_tokenizer = wanted.build()
    base.normalizer = None
    if wanted.normalizers():
        (base.normalizer,) = wanted.normalizers()
    base.model.ignore_merges = wanted.ignores_merges
    found = byte_level_metadata(base, base.get_vocab_size(), "vocabulary", space_prefix=False)["tokenizer.ggml.pre"]
    assert found == pre or PRE_TOKENIZERS[found] == wanted


def test_what_cannot_be_written_is_refused(model, tokenizer, tmp_path, getkey):
    path = tmp_path / "model.gguf"
    with refused("tokenizer", "load_tokenizer"):
        mx.save(model, path, format="gguf")
    with refused("IQ1_S", "Q8_0", "Q4_K_M"):
        mx.save(model, path, format="gguf", type="IQ1_S", tokenizer=tokenizer)
    with refused("dense", "dequantize"):
        mx.save(mx.quantize(model, mx.NF4(32)), path, format="gguf", tokenizer=tokenizer)
    with refused("windows"):
        windows = random_model(dataclasses.replace(model.config, windows=(None, 8)), getkey())
        mx.save(windows, path, format="gguf", tokenizer=tokenizer)
    with refused("tokens", "rows"):
        mx.save(random_model(tiny(vocab=64), getkey()), path, format="gguf", tokenizer=tokenizer)
    with refused("finish"):
        mx.save(model, path, format="gguf", tokenizer=tokenizer, finish=tokenizer.save)
    with refused("type", "'hf'"):
        mx.save(model, tmp_path / "hf", type="Q8_0")
    with refused("tokenizer", "'hf'", "finish"):
        mx.save(model, tmp_path / "hf", tokenizer=tokenizer)
    mx.save(model, tmp_path / "source", finish=tokenizer.save)
    with refused("tokenizer=False"):
        mx.convert(tmp_path / "source", path, format="gguf", tokenizer=False)
    with refused("no merges"):
        bare = save_tiny_model(tmp_path / "bare")
        mx.convert(bare, path, format="gguf")
    path.write_bytes(b"mine")
    for overwrite in (False, True):
        with refused("model.gguf"):
            mx.save(model, path, format="gguf", tokenizer=tokenizer, overwrite=overwrite)
    assert path.read_bytes() == b"mine"
    (tmp_path / "folder").mkdir()
    with refused("folder", "one file"):
        mx.save(model, tmp_path / "folder", format="gguf", tokenizer=tokenizer)


@pytest.mark.slow
def test_llama_cpp_runs_what_is_written(smollm2_path, tmp_path):
    """In 16 bits, which it multiplies without rounding activations: the same tokens."""
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer, prompt = mx.load_tokenizer(smollm2_path), "The capital of France is"
    mx.save(mx.load(smollm2_path, dtype="float16"), tmp_path / "f16.gguf", format="gguf", tokenizer=tokenizer)
    theirs = llama_cpp.Llama(str(tmp_path / "f16.gguf"), n_ctx=128, verbose=False)
    text = "I'm 12345 years old;  caf\u00e9 \n\n\tdef f(x)"
    assert theirs.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text)
    found = theirs.create_completion(tokenizer.encode(prompt), max_tokens=24, temperature=0)["choices"][0]["text"]
    model = mx.load(tmp_path / "f16.gguf", dtype="float32")
    assert found == mx.generate(model, [prompt], max_new_tokens=24, tokenizer=tokenizer).texts[0]


@pytest.mark.long
@pytest.mark.parametrize("mixture", ["Q2_K", "Q3_K_M", "Q4_K_M"])
def test_a_mixture_of_a_model_is_that_of_llama_quantize(mixture, smollm2_path, tmp_path, monkeypatch):
    """SmolLM2: 256 divides the rows of `down_proj` alone."""
    llama_cpp = pytest.importorskip("llama_cpp")
    source, path = tmp_path / "f16.gguf", tmp_path / "model.gguf"
    mx.convert(smollm2_path, source, format="gguf", type="F16")
    mx.convert(source, path, format="gguf", type=mixture)
    theirs = llama_quantize.quantize_file(source, tmp_path / "theirs.gguf", mixture)
    ours, expected = ({tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors} for file in (path, theirs))
    assert {name: one.tensor_type for name, one in ours.items()} == {n: one.tensor_type for n, one in expected.items()}
    # As in test_quant_k_types: where a compiler joins multiplications with additions, some blocks may differ.
    same = [np.array_equal(ours[name].data, expected[name].data) for name in ours]
    assert np.mean(same) >= 0.99, f"{sum(same)} of {len(same)} tensors have the same bits"
    # Without its instructions for matrices, which some virtual machines announce and do not have.
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", lambda: params)
    tokenizer, prompt = mx.load_tokenizer(path), "The capital of France is"
    model = llama_cpp.Llama(str(path), n_ctx=128, verbose=False)
    found = model.create_completion(tokenizer.encode(prompt), max_tokens=12, temperature=0)["choices"][0]["text"]
    ours = mx.load(path, dtype="float32")
    assert found == mx.generate(ours, [prompt], max_new_tokens=12, tokenizer=tokenizer).texts[0]
