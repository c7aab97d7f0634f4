"""Continues prompts of many lengths in one batch, and many questions after one beginning that is read once.

Differs from generate.py in `num_samples`, `stop`, `logprobs` and `prefill`.
"""

import math
import sys

import jax.random as jr

import mistral_eqx as mx


QUESTIONS = (
    "What is the capital of Italy?",
    "How many legs does a spider have?",
    "Which planet do we live on?",
)


def main(name="smollm2-135m"):
    model, tokenizer = mx.from_pretrained(name)

    # Each row gives what it would give alone, though these are padded to one length.
    prompts = [
        tokenizer.encode(text) for text in ("The capital of France is", "1, 2, 3,", "Once upon a time there was")
    ]
    out = mx.generate(model, prompts, max_new_tokens=16, tokenizer=tokenizer)
    for text in out.texts:
        print(f"greedy: {text!r}")

    # Several samples of each prompt, which is read once; each ends with its line.
    out = mx.generate(
        model,
        prompts[:2],
        max_new_tokens=16,
        sampler=mx.Sampler(temperature=0.8, min_p=0.05, processors=[mx.RepetitionPenalty(1.1)]),
        key=jr.key(0),
        num_samples=2,
        stop=["\n", "."],
        tokenizer=tokenizer,
        logprobs=0,
    )
    for text, log_probs, length in zip(out.texts, out.log_probs, out.lengths, strict=True):
        print(f"sample: {text!r}, each token with probability {math.exp(log_probs[:length].mean()):.2f}")

    # The beginning that all questions share is read once.
    beginning = mx.prefill(model, tokenizer.encode("Answers to questions, in one word each.\n"))
    questions = [tokenizer.encode(f"Q: {question}\nA:", add_bos=False) for question in QUESTIONS]
    out = mx.generate(model, questions, max_new_tokens=8, prefix=beginning, stop="\n", tokenizer=tokenizer)
    for question, text in zip(QUESTIONS, out.texts, strict=True):
        print(f"{question}{text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
