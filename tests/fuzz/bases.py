"""Writes the small valid files that are damaged: `python tests/fuzz/bases.py FOLDER`."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import gguf
import jax.random as jr
from fixtures.checkpoint import TINY, random_model, write_gguf
from fixtures.text import tiny as vocabularies

import mistral_eqx as mx


RECIPE = """folder = "run"

[model]
name = "gpt-nano"
config = {layers = 1, embed = 16, hidden = 16, kv_heads = 1, q_per_kv = 1, head_dim = 16}
seed = 0

[data]
kind = "sort"
options = {length = 3, symbols = 3}
rows = 4
seed = 0

[optimizer]
learning_rate = 1e-3
schedule = "cosine"
warmup = 1
end = 0.0
weight_decay = 0.1
b1 = 0.9
b2 = 0.95
eps = 1e-8

[training]
steps = 2
compute_dtype = "float32"
accumulate = 1
clip = 1.0
remat = "none"
label_smoothing = 0.0
z_loss = 0.0
zero = 0
seed = 0
save_every = 2
keep = 1
evaluate_every = 2
log_every = 1
"""
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello the 123"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "again <|im_end|>"},
]


def write(folder: Path):
    """Makes every base below `folder`."""

    def model(metadata, seed):
        config = dataclasses.replace(TINY, vocab=len(metadata["tokens"]), max_positions=256)
        return random_model(config, jr.key(seed))

    bytes_, pieces = vocabularies.byte_level_metadata(), vocabularies.sentencepiece_metadata()
    write_gguf(folder / "bytes.gguf", model(bytes_, 0), gguf.GGMLQuantizationType.Q8_0, vocabulary=bytes_)
    write_gguf(folder / "pieces.gguf", model(pieces, 1), vocabulary=pieces)
    mx.convert(folder / "bytes.gguf", folder / "hf", format="hf")
    mx.convert(folder / "bytes.gguf", folder / "shards", format="hf", max_shard_size="60KB")
    mx.convert(folder / "pieces.gguf", folder / "mistral", format="mistral")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "mistral" / file).unlink(missing_ok=True)
    (folder / "mistral" / "tokenizer.model").rename(folder / "mistral" / "tokenizer.model.v3")
    adapted = mx.apply_lora(mx.load(folder / "hf"), rank=2, alpha=4.0, key=jr.key(2))
    mx.save_lora(adapted, folder / "adapter")
    shutil.copytree(folder / "hf", folder / "tekken")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tekken" / file).unlink()
    (folder / "tekken" / "tekken.json").write_text(json.dumps(_tekken()))
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "messages.json").write_text(json.dumps(MESSAGES))
    (folder / "hf" / "chat_template.jinja").write_text(vocabularies.CHATML)
    (folder / "hf" / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 0]}')
    (folder / "hf" / "options.json").write_text("[]")
    lines = [{"prompt": "hello", "id": 1}, {"prompt": "the 123"}, "hello again"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _tekken():
    import base64

    control = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SP{number}>" for number in range(5, 18))]
    return {
        "config": {
            "pattern": r"[^\s]+|\s+",
            "num_vocab_tokens": 256,
            "default_vocab_size": 274,
            "default_num_special_tokens": 18,
            "version": "v3",
        },
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
            for byte in range(256)
        ],
        "special_tokens": [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(control)],
    }


if __name__ == "__main__":
    write(Path(sys.argv[1]))
