"""Quantizes a model in several ways, and compares size, perplexity and text with float32."""

import sys
from pathlib import Path

import jax

import mistral_eqx as mx


SCHEMES = {
    "int8, a scale a row": mx.Int8(),
    "int8, activations too": mx.Int8(activations="int8", threshold=6.0),
    "4 bits, groups of 64": mx.Int4(group_size=64),
    "the same, searched": mx.Int4(group_size=64, search=True),
    "NF4": mx.NF4(block_size=64),
    "FP8": mx.FP8(),
}


def main(name="smollm2-135m", characters="3000"):
    model, tokenizer = mx.from_pretrained(name, dtype="float32")
    text = (Path(__file__).parent / "data/moby-dick.txt").read_text(encoding="utf-8")[: int(characters)]
    for scheme in (None, *SCHEMES):
        small = model if scheme is None else mx.quantize(model, SCHEMES[scheme])
        megabytes = sum(x.nbytes for x in jax.tree.leaves(small) if isinstance(x, jax.Array)) / 1e6
        found = mx.perplexity(small, tokenizer, text, context=512)
        out = mx.generate(small, ["The capital of France is"], max_new_tokens=8, tokenizer=tokenizer)
        print(f"{scheme or 'float32':22} {megabytes:4.0f} MB  perplexity {found.perplexity:7.3f}  {out.texts[0]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
