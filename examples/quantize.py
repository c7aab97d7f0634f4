"""Quantizes a model in several ways, and compares size, perplexity and text with float32."""

import sys
from pathlib import Path

import jax

import mistral_eqx as mx


def schemes(size):
    return {
        "float32": {},
        "int8, a scale a row": mx.Int8(),
        "int8, activations too": mx.Int8(activations="int8", threshold=6.0),
        f"4 bits, groups of {size}": mx.RTN(group_size=size),
        "the same, searched": mx.RTN(group_size=size, search=True),
        "NF4": mx.NF4(block_size=size),
        "FP8": mx.FP8(),
    }


def main(name="smollm2-135m", characters="3000", size="64"):
    model, tokenizer = mx.from_pretrained(name, dtype="float32")
    text = (Path(__file__).parent / "data/moby-dick.txt").read_text(encoding="utf-8")[: int(characters)]
    for words, scheme in schemes(int(size)).items():
        small = mx.quantize(model, scheme)
        megabytes = sum(x.nbytes for x in jax.tree.leaves(small) if isinstance(x, jax.Array)) / 1e6
        found = mx.perplexity(small, tokenizer, text, context=512)
        out = mx.generate(small, ["The capital of France is"], max_new_tokens=8, tokenizer=tokenizer)
        print(f"{words:22} {megabytes:5.1f} MB  perplexity {found.perplexity:7.3f}  {out.texts[0]!r}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
