"""Generates from a GGUF file whose weights stay quantized, and with weights that are expanded."""

import sys

import jax

import mistral_eqx as mx
from mistral_eqx.quant import formats


def main(name="smollm2-135m"):
    tokenizer = mx.load_tokenizer(name)
    for dtype in ("float32", None):
        model = mx.load(name, dtype=dtype)
        megabytes = sum(x.nbytes for x in jax.tree.leaves(model) if isinstance(x, jax.Array)) / 1e6
        out = mx.generate(model, ["The capital of France is"], max_new_tokens=12, tokenizer=tokenizer)
        print(f"{' and '.join(formats(model)) or dtype}, {megabytes:.0f} MB: {out.texts[0]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
