"""Reads a long prompt: differs from generate.py in the prompt's length, and in figures of time and memory."""

import resource
import sys
import time

import mistral_eqx as mx


def main(name="smollm2-135m", tokens=4000):
    model, tokenizer = mx.from_pretrained(name)
    config, tokens = model.config, int(tokens)
    sentence = tokenizer.encode("The quick brown fox jumps over the lazy dog. ")
    prompt = (sentence * (tokens // len(sentence) + 1))[:tokens]

    start = time.perf_counter()
    out = mx.generate(model, [prompt], max_new_tokens=16)
    seconds = time.perf_counter() - start
    print(repr(tokenizer.decode(out.tokens[0], after=prompt)))

    scores = config.q_heads * tokens**2 * 4
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{tokens} tokens read and 16 decoded in {seconds:.1f} s, compiling included")
    print(f"all scores of one layer: {scores / 1e6:,.0f} MB; the whole process at most: {peak / 1e6:,.0f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
