"""Prints each token as it is decoded: differs from generate.py in `stream` and in the detokenizer."""

import sys

import mistral_eqx as mx


def main(name="smollm2-135m"):
    model = mx.load(name)
    tokenizer = mx.load_tokenizer(name)
    prompt = tokenizer.encode("The capital of France is")
    text = mx.Detokenizer(tokenizer, after=prompt)
    for (token,) in mx.stream(model, [prompt], max_new_tokens=32, eos_id=tokenizer.eos_ids):
        print(text.push(token), end="", flush=True)
    print(text.flush())


if __name__ == "__main__":
    main(*sys.argv[1:])
