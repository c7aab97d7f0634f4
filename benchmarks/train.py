"""How fast is a model trained, here and with transformers and torch?

The weights of the preset `smollm2-135m` in float32, AdamW, 4 rows of 256 tokens of Moby-Dick a step: here with each
rematerialisation policy, and with transformers, whose losses must be the same, step by step. Once more with products in
bfloat16: here by `compute_dtype`, and with transformers by torch's autocast.

And how long does a step take to compile? That of 8 and that of 32 layers, which are scanned.

    python benchmarks/train.py --json train.json
    python benchmarks/train.py --float32 --write

The second leaves bfloat16 out, which few processors multiply, and puts the tables into the README beside this file.
Each contender runs in a process of its own, once a round; run nothing beside it.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rounds import (
    MODEL,
    REFERENCE,
    TIMES,
    Weights,
    exported_weights,
    footnote,
    in_rounds,
    keep,
    load_transformers,
    make_report,
    options,
    peak_gb,
    pooled,
    positive,
    spread,
    table,
    timed,
    use_cpu,
)


DATA = Path(__file__).parents[1] / "examples" / "data" / "moby-dick.txt"
ROWS, SEQ = 4, 256
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-5, 0.1, (0.9, 0.95), 1e-8, 1.0
LAYERS = 8, 32

# The same sums in another order: of float32's 7 digits of a loss near 3, the last two may differ.
FIRST_TOLERANCE = 1e-4
# Where a gradient is nothing but rounding, Adam still makes a step of the whole learning rate, in either direction.
LATER_TOLERANCE = 1e-3
# A bfloat16 has 3 digits. Later losses are not compared: most updates are smaller than the distance to the next
# bfloat16, so that products change with a few weights by much and with the others not at all.
BFLOAT16_TOLERANCE = 2e-2

# Makes a step, and returns its loss.
Step = Callable[[list[list[int]]], float]


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender is given.

    **Attributes:**

    - `weights`: the files.
    - `batches`: for each step rows of one token more than are read, since each one but the first is told.
    """

    weights: Weights
    batches: list[list[list[int]]]


def start_mistral_eqx(task: Task, dtype: str, remat: str) -> Step:
    import mistral_eqx as mx
    from mistral_eqx import train

    optimizer = train.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, b1=BETAS[0], b2=BETAS[1], eps=EPS)
    state = train.TrainState.init(mx.load(task.weights.file, dtype="float32"), optimizer)
    make = train.make_step(optimizer, compute_dtype=dtype, clip=CLIP, remat=remat)

    def step(rows: list[list[int]]) -> float:
        nonlocal state
        state, metrics = make(state, train.one_a_row([train.causal(row) for row in rows], SEQ))
        return float(metrics.loss)

    return step


def start_transformers(task: Task, dtype: str) -> Step:
    import torch

    model = load_transformers(task.weights.folder, "float32", attn_implementation="sdpa")
    model.train()
    decayed = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
        fused=True,
    )

    def step(rows: list[list[int]]) -> float:
        ids = torch.tensor(rows)
        targets = ids[:, 1:].contiguous()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            # Without shift_labels, the last token of each row would have no target.
            loss = model(input_ids=ids[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


# By the precision of the products, so that each is compared with transformers in the same one.
STARTS: dict[str, dict[str, Callable[[Task], Step]]] = {
    "float32": {
        REFERENCE: functools.partial(start_transformers, dtype="float32"),
        **{
            f"mistral_eqx float32, remat {remat}": functools.partial(start_mistral_eqx, dtype="float32", remat=remat)
            for remat in ("none", "dots", "block")
        },
    },
    "bfloat16": {
        "transformers bfloat16, autocast": functools.partial(start_transformers, dtype="bfloat16"),
        "mistral_eqx bfloat16, remat dots": functools.partial(start_mistral_eqx, dtype="bfloat16", remat="dots"),
    },
}


def measure(start: Callable[[Task], Step], task: Task) -> dict[str, Any]:
    """One contender in one round: the seconds of each step, the first one apart, and all losses."""
    step = start(task)
    (first, loss), *others = (timed(step, rows) for rows in task.batches)
    return {
        "first_step_seconds": first,
        "rates": [ROWS * SEQ / seconds for seconds, _ in others],
        "losses": [loss, *(loss for _, loss in others)],
    }


def measure_compiling(layers: int) -> dict[str, Any]:
    """How long the step of so many layers takes to lower and to compile. No weights are made."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr

    import mistral_eqx as mx
    from mistral_eqx import train
    from mistral_eqx.presets import PRESETS

    config = dataclasses.replace(PRESETS[MODEL], layers=layers, windows=(None,) * layers)
    optimizer = train.adamw(LEARNING_RATE)
    state = eqx.filter_eval_shape(
        lambda key: train.TrainState.init(mx.Mistral.init(config, key=key), optimizer), jr.key(0)
    )
    shapes, static = eqx.partition(state, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    step = train.make_step(optimizer, compute_dtype=None, remat="none")
    ids = jax.ShapeDtypeStruct((ROWS, SEQ), jnp.int32)
    batch = train.Batch(ids, ids, jax.ShapeDtypeStruct((ROWS, SEQ), jnp.float32), ids, ids, ids)
    # What JAX sets up once is not the step's.
    jax.jit(lambda x: x + 1)(1.0)
    jitted = jax.jit(lambda shapes, batch: eqx.filter(step(eqx.combine(shapes, static), batch), eqx.is_array))
    lowering, lowered = timed(jitted.lower, shapes, batch)
    compiling, _ = timed(lowered.compile)
    return {"lower_seconds": lowering, "compile_seconds": compiling}


def tell(found: dict[str, Any]) -> str:
    return f"{statistics.median(found['rates']):6.1f} tokens/s, last loss {found['losses'][-1]:.4f}"


def tell_compiling(found: dict[str, Any]) -> str:
    return f"{total(found):6.1f} s"


def total(found: dict[str, Any]) -> float:
    return found["lower_seconds"] + found["compile_seconds"]


def differences(measured: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[float, float]]:
    """By how much each contender's losses differ from those of transformers: the first one, and any other at most."""
    reference = measured[REFERENCE][0]["losses"]
    result = {}
    for name, found in measured.items():
        first, *others = (max(abs(one["losses"][at] - loss) for one in found) for at, loss in enumerate(reference))
        result[name] = first, max(others)
    return result


def markdown(report: dict[str, Any]) -> str:
    """The tables and what one must know to read them."""
    measured, compiling = report["measured"], report["compiling"]
    rates = {name: pooled(found, "rates") for name, found in measured.items()}
    medians = {name: statistics.median(one) for name, one in rates.items()}
    lines = [
        ["", "tokens/s", f"{TIMES} transformers", "first step, s", "peak, GB", "last loss", "first loss differs by"]
    ]
    for precision in report["precisions"]:
        same_precision = STARTS[precision]
        theirs = next(iter(same_precision))
        for name in same_precision:
            found = measured[name]
            lines.append(
                [
                    name,
                    spread(rates[name], 1),
                    f"{medians[name] / medians[theirs]:.2f}",
                    f"{statistics.median(one['first_step_seconds'] for one in found):.1f}",
                    peak_gb(found),
                    f"{found[0]['losses'][-1]:.4f}",
                    f"{report['differences'][name][0]:.0e}",
                ]
            )
    seconds = {name: statistics.median(map(total, found)) for name, found in compiling.items()}
    least = seconds[f"{LAYERS[0]} layers"]
    compiled = [["", "lower, s", "compile, s", f"{TIMES} {LAYERS[0]} layers"]]
    for name, found in compiling.items():
        parts = [statistics.median(one[part] for one in found) for part in ("lower_seconds", "compile_seconds")]
        compiled.append([name, *(f"{part:.1f}" for part in parts), f"{seconds[name] / least:.2f}"])
    how = (
        f"{ROWS} rows of {SEQ} tokens a step; rounds: {report['rounds']}, steps in each: {report['steps']}, after one "
        "that is not counted; medians of all, with the least and the most."
    )
    return f"{table(lines)}\n\n{table(compiled)}\n\n{footnote(report, how)}"


def main():
    parser = options(__doc__, repetitions=None)
    parser.add_argument("--steps", type=positive, default=6, help="measured steps in each round (6)")
    parser.add_argument(
        "--float32",
        action="store_true",
        help="no products in bfloat16, for which torch takes minutes a step on a processor that cannot multiply them",
    )
    arguments = parser.parse_args()
    precisions = ["float32"] if arguments.float32 else list(STARTS)
    use_cpu()

    import mistral_eqx as mx

    ids = mx.load_tokenizer(MODEL).encode(DATA.read_text(encoding="utf-8"))
    rows = [ids[start : start + SEQ + 1] for start in range(0, len(ids) - SEQ, SEQ)]
    batches = [rows[start : start + ROWS] for start in range(0, len(rows) - ROWS + 1, ROWS)]
    if arguments.steps >= len(batches):
        parser.error(f"--steps must be less than {len(batches)}, for which {DATA.name} has tokens.")
    with exported_weights() as weights:
        task = Task(weights, batches[: arguments.steps + 1])
        contenders = {name: (start, task) for one in precisions for name, start in STARTS[one].items()}
        measured, others = in_rounds(measure, contenders, arguments.rounds, tell)
    shapes = {f"{layers} layers": (layers,) for layers in LAYERS}
    compiling, more_others = in_rounds(measure_compiling, shapes, arguments.rounds, tell_compiling)
    report = make_report(
        arguments,
        measured,
        others + more_others,
        precisions=precisions,
        compiling=compiling,
        differences=differences(measured),
    )
    keep(report, markdown(report), "train", arguments)
    print(markdown(report))
    for name, (first, later) in report["differences"].items():
        exact = name in STARTS["float32"]
        if first > (FIRST_TOLERANCE if exact else BFLOAT16_TOLERANCE) or (exact and later > LATER_TOLERANCE):
            sys.exit(
                f"The losses of {name} differ from those of {REFERENCE} by {first:.1e} in the first step and by up to "
                f"{later:.1e} in later ones: they did not do the same work."
            )


if __name__ == "__main__":
    main()
