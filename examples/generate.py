"""Loads a model, continues a prompt and prints the text."""

import sys

import mistral_eqx as mx


def main(name="smollm2-135m"):
    model, tokenizer = mx.from_pretrained(name)
    out = mx.generate(model, "The capital of France is", max_new_tokens=32, tokenizer=tokenizer)
    print(out.texts[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
