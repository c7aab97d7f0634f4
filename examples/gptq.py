"""Quantizes a model with GPTQ and AWQ on the beginning of a book, and measures them and round to nearest on its end."""

import sys
import time
from pathlib import Path

import numpy as np

import mistral_eqx as mx


def main(name="smollm2-135m", tokens="8192", characters="2000", size="64"):
    model, tokenizer = mx.from_pretrained(name, dtype="float32")
    text = (Path(__file__).parent / "data/moby-dick.txt").read_text(encoding="utf-8")
    seq = min(512, model.config.max_positions)
    calibration = np.array(tokenizer.encode(text)[: int(tokens) // seq * seq]).reshape(-1, seq)
    schemes = {
        "float32": None,
        "round to nearest": mx.RTN(group_size=int(size)),
        "AWQ": mx.AWQ(group_size=int(size)),
        "GPTQ": mx.GPTQ(group_size=int(size), act_order=True),
    }
    for words, scheme in schemes.items():
        start, small = time.perf_counter(), model
        if scheme is not None:
            small = mx.quantize(model, scheme, calibration=None if isinstance(scheme, mx.RTN) else calibration)
        seconds = time.perf_counter() - start
        found = mx.perplexity(small, tokenizer, text[-int(characters) :], context=512)
        print(f"{words:16} {seconds:5.1f} s  perplexity {found.perplexity:7.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
