"""How well does a model foretell a book? Scores windows that slide over the file, and shows where it was surprised.

Differs from generate.py in `perplexity` and `score`.
"""

import sys
from pathlib import Path

import numpy as np

import mistral_eqx as mx


BOOK = Path(__file__).parent / "data" / "moby-dick.txt"


def main(name="smollm2-135m", path=BOOK, context=256, characters=4000):
    model, tokenizer = mx.from_pretrained(name)

    text = Path(path).read_text(encoding="utf-8")[: int(characters)]
    found = mx.perplexity(model, tokenizer, text, context=int(context), batch=4)
    print(f"{found.tokens} tokens: perplexity {found.perplexity:.2f}, {found.bits_per_byte:.3f} bits per byte")

    # The likelihood of each token; the first has none.
    ids = tokenizer.encode(text)[:64]
    scores = mx.score(model, [ids])
    print(f"{int(scores.greedy.sum())} of the first {len(ids) - 1} are the likeliest in their place")
    for at in np.argsort(scores.log_probs[0])[:5]:
        before, token = tokenizer.decode(ids[max(0, at - 4) : at]), tokenizer.decode(ids[at : at + 1])
        print(f"probability {np.exp(scores.log_probs[0, at]):.1e}: {token!r} after {before!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
