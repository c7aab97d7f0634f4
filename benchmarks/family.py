"""Which slice of TPUs, or how many GPUs, hold each model of the family, and how fast could they be at best?

    python benchmarks/family.py --write

Nothing is compiled or allocated: the bytes are those of shapes, from `mistral_eqx.planning.smallest`. The times are a
roofline in closed form: operations, bytes and exchanges over the peaks of data sheets. `--write` puts both tables into
docs/family.md. It takes some minutes.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from rounds import table, use_cpu, write

import mistral_eqx as mx
from mistral_eqx.planning import (
    CHIPS,
    Collective,
    Exchange,
    Holding,
    decoding_step,
    exchange_seconds,
    operations,
    prefill,
    smallest,
    weights_read,
)


PAGE = Path(__file__).parents[1] / "docs" / "family.md"
MODELS = (
    *("ministral-3-3b", "voxtral-mini-3b", "7b-v0.3", "ministral-8b", "ministral-3-8b", "nemo-12b", "ministral-3-14b"),
    *("small-3.1-24b", "devstral-small-2-24b", "8x7b", "large-2-123b", "devstral-2-123b", "medium-3.5-128b"),
    *("8x22b", "small-4-119b", "large-3-675b"),
)
FORMATS = {"bfloat16": None, "FP8": mx.FP8(), "NF4/64": mx.NF4()}
BATCH, PROMPT, KV_SEQ = 1, 512, 32_768
PLACES = tuple(CHIPS.values())


def seconds(config: mx.MistralConfig, held: Holding, tokens: int, exchanges: list[Collective]) -> float:
    """The least time of a pass: the longer of compute and memory, and the exchanges, which a layer waits for."""
    strategy, axes = mx.Strategy(held.layout), held.axes
    context = (tokens + 1) / 2 if tokens > 1 else float(held.kv_seq)
    sizes = {"batch": held.batch, "seq": tokens, "context": context, "logits": 1}
    read = weights_read(config, strategy, axes, tokens=held.batch * tokens)
    moved = held.weights * read + (held.cache if tokens == 1 else 0)
    links = sum(exchange_seconds(held.chip, Exchange(e.kind, e.devices, e.count, e.count * e.bytes)) for e in exchanges)
    flops = operations(config, strategy, axes, **sizes)
    return max(flops / held.chip.flops, moved / held.chip.hbm_bandwidth) + links


def times(config: mx.MistralConfig, held: Holding) -> tuple[float, float]:
    """The seconds of a prompt, and of each new token."""
    strategy, axes = mx.Strategy(held.layout), held.axes
    read = prefill(config, strategy, axes, batch=held.batch, seq=PROMPT, kv_seq=PROMPT)
    step = decoding_step(config, strategy, axes, batch=held.batch, kv_seq=held.kv_seq)
    return seconds(config, held, PROMPT, read), seconds(config, held, 1, step)


def rows(models: tuple[str, ...]) -> Iterator[tuple[list[str], list[str]]]:
    """For each model and format, the cells of both tables."""
    for model in models:
        config = mx.PRESETS[model]
        for number, (name, scheme) in enumerate(FORMATS.items()):
            print(model, name, file=sys.stderr, flush=True)
            memory, speed = [], []
            for place in PLACES:
                held = smallest(config, place, quantize=scheme, batch=BATCH, kv_seq=min(KV_SEQ, config.max_positions))
                read, step = times(config, held)
                memory.append(f"{held.devices}, {held.total / 1e9:.1f}")
                speed.append(f"{1e3 * read:.0f}, {1e3 * step:.1f}")
            first = [f"`{model}`" if number == 0 else "", name]
            yield [*first, *memory], [*first, *speed]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if name in mx.PRESETS])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/family.md")
    arguments = parser.parse_args()
    use_cpu()
    memory, speed = zip(*rows(tuple(arguments.models)), strict=True)
    head = ["", "format", *(f"{place.name}, {place.hbm_bytes / 1e9:.0f} GB" for place in PLACES)]
    blocks = {"holdings": table([head, *memory]), "times": table([head, *speed])}
    for name, block in blocks.items():
        if arguments.write:
            write(block, name, PAGE)
        else:
            print(f"{block}\n")


if __name__ == "__main__":
    main()
