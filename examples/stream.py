"""Prints each token as it is decoded: differs from generate.py in `stream` and in the detokenizer."""

import sys

import mistral_eqx as mx


def main(name="smollm2-135m"):
    model, tokenizer = mx.from_pretrained(name)
    prompt = tokenizer.encode("The capital of France is")
    text = mx.Detokenizer(tokenizer, after=prompt)
    for (token,) in mx.stream(model, [prompt], max_new_tokens=32):
        print(text.push(token), end="", flush=True)
    print(text.flush())


if __name__ == "__main__":
    main(*sys.argv[1:])
