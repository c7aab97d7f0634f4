"""Decodes several tokens in one pass of the model: differs from generate.py in `speculate`.

A text that repeats itself gets faster, another one hardly changes, and the tokens are the same in both.
"""

import sys
import time

import mistral_eqx as mx


RECORDS = """Turn each line into a record.
apples, 3 boxes, 12 euros -> {"name": "apples", "boxes": 3, "price": 12}
pears, 5 boxes, 20 euros -> {"name": "pears", "boxes": 5, "price": 20}
plums, 2 boxes, 9 euros -> {"name": "plums", "boxes": 2, "price": 9}
figs, 4 boxes, 31 euros -> {"name": "figs","""
STORY = "On the first evening after the harvest, the old miller"


def main(name="smollm2-135m", new_tokens=96):
    model, tokenizer = mx.from_pretrained(name)
    for title, text in (("repeats itself", RECORDS), ("free", STORY)):
        found = {}
        for proposer in (None, mx.PromptLookup()):
            # The first call compiles, and measures what a pass over proposals costs.
            for _ in range(2):
                begin = time.perf_counter()
                out = mx.generate(
                    model, text, max_new_tokens=int(new_tokens), eos_id=(), tokenizer=tokenizer, speculate=proposer
                )
                seconds = time.perf_counter() - begin
            found[proposer] = out
            how = "plain" if proposer is None else "prompt lookup"
            line = f"{title}, {how}: {int(out.lengths[0]) / seconds:.1f} tokens/s"
            if out.acceptance is not None:
                accepted, proposed, passes, steps = out.acceptance
                line += f", {accepted} of {proposed} proposed tokens accepted, {passes + steps} passes"
            print(line)
        plain, looked_up = found.values()
        print("the same text" if plain.texts == looked_up.texts else "another text", repr(plain.texts[0][:60]))


if __name__ == "__main__":
    main(*sys.argv[1:])
