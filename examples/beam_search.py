"""Finds likelier texts than greedy decoding does: differs from generate.py in that several are followed at once."""

import sys

import mistral_eqx as mx


def main(name="smollm2-135m"):
    model, tokenizer = mx.from_pretrained(name)
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "Once upon a time")]
    for penalty in (-1.0, 1.0):
        best = mx.beam_search(
            model,
            prompts,
            num_beams=4,
            num_return_sequences=2,
            max_new_tokens=24,
            length_penalty=penalty,
            early_stopping="never",
            # A full stop ends a text as well.
            eos_id=[*tokenizer.eos_ids, *tokenizer.encode(".", add_bos=False)],
        )
        print(f"length penalty {penalty}")
        for prompt, *found in zip(prompts, best.tokens, best.lengths, best.scores, strict=True):
            for tokens, length, score in zip(*found, strict=True):
                print(f"  {score:8.3f} {tokenizer.decode(tokens[:length], after=prompt)!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
