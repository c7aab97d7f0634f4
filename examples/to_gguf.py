"""Writes a model as a GGUF file, which llama.cpp runs, and reads it again."""

import sys
from pathlib import Path

import mistral_eqx as mx


def main(name="smollm2-135m", path="model-q8_0.gguf", type="Q8_0"):
    model, tokenizer = mx.from_pretrained(name, dtype="float32")
    mx.save(model, path, format="gguf", type=type, tokenizer=tokenizer, overwrite=True)
    again = mx.load(path)
    out = mx.generate(again, ["The capital of France is"], max_new_tokens=12, tokenizer=mx.load_tokenizer(path))
    print(f"{path}, {Path(path).stat().st_size / 1e6:.1f} MB: {out.texts[0]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
