"""Loads a model, continues a prompt and prints the text."""

import sys

import mistral_eqx as mx


def main(name="smollm2-135m"):
    model = mx.load(name)
    tokenizer = mx.load_tokenizer(name)
    prompt = tokenizer.encode("The capital of France is")
    out = mx.generate(model, [prompt], max_new_tokens=32, eos_id=tokenizer.eos_ids, tokenizer=tokenizer)
    print(out.texts[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
