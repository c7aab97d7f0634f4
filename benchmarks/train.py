"""How fast is a model trained, here and with transformers and torch?

The weights of the preset `smollm2-135m` in float32, AdamW, 4 rows of 256 tokens of Moby-Dick a step: here with each
choice of what the backward pass computes again, and with transformers, whose losses must be the same, step by step.

And how long does a step take to compile? That of 8 and that of 32 layers, which are scanned.

    python benchmarks/train.py --json train.json
    python benchmarks/train.py --write

The second puts the tables into the README beside this file. Each contender runs in a process of its own, once a round;
run nothing beside it.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import MODEL, REFERENCE, positive
from rounds import (
    TIMES,
    export,
    footnote,
    in_own_process,
    in_rounds,
    machine,
    peak_bytes,
    table,
    usable_cores,
    versions,
    write,
)


DATA = Path(__file__).parents[1] / "examples" / "data" / "moby-dick.txt"
ROWS, SEQ = 4, 256
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-5, 0.1, (0.9, 0.95), 1e-8, 1.0
LAYERS = 8, 32

# The same sums in another order: of float32's 7 digits of a loss near 3, the last two may differ.
FIRST_TOLERANCE = 1e-4
# Where a gradient is nothing but rounding, Adam still makes a step of the whole learning rate, in either direction.
LATER_TOLERANCE = 1e-3

# Makes a step, and returns its loss.
Step = Callable[[list[list[int]]], float]


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender is given.

    **Attributes:**

    - `file`: the GGUF file.
    - `folder`: its weights in float32, as transformers reads them.
    - `batches`: for each step rows of one token more than are read, since each one but the first is told.
    """

    file: Path
    folder: Path
    batches: list[list[list[int]]]


def start_mistral_eqx(task: Task, remat: str) -> Step:
    import mistral_eqx as mx
    from mistral_eqx import train

    optimizer = train.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, b1=BETAS[0], b2=BETAS[1], eps=EPS)
    state = train.TrainState.init(mx.load(task.file, dtype="float32"), optimizer)
    make = train.make_step(optimizer, compute_dtype=None, clip=CLIP, remat=remat)

    def step(rows: list[list[int]]) -> float:
        nonlocal state
        state, metrics = make(state, train.one_a_row([train.causal(row) for row in rows], SEQ))
        return float(metrics.loss)

    return step


def start_transformers(task: Task, remat: None) -> Step:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(usable_cores())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        task.folder, dtype=torch.float32, attn_implementation="sdpa"
    )
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
        # Told so, it does not leave the last token of each row without a target.
        loss = model(input_ids=ids[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


CONTENDERS: dict[str, tuple[Callable[[Task, Any], Step], str | None]] = {
    REFERENCE: (start_transformers, None),
    **{f"mistral_eqx float32, remat {remat}": (start_mistral_eqx, remat) for remat in ("none", "dots", "block")},
}


def measure(name: str, task: Task) -> dict[str, Any]:
    """One contender in one round: the seconds of each step, the first one apart, and all losses."""
    start, remat = CONTENDERS[name]
    step = start(task, remat)
    seconds, losses = [], []
    for rows in task.batches:
        begin = time.perf_counter()
        losses.append(step(rows))
        seconds.append(time.perf_counter() - begin)
    first, *others = seconds
    return {
        "first_step_seconds": first,
        "rates": [ROWS * SEQ / one for one in others],
        "losses": losses,
        "peak_bytes": peak_bytes(),
        "processor_seconds": time.process_time(),
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
    begin = time.perf_counter()
    lowered = jax.jit(lambda shapes, batch: eqx.filter(step(eqx.combine(shapes, static), batch), eqx.is_array)).lower(
        shapes, batch
    )
    middle = time.perf_counter()
    lowered.compile()
    return {
        "lower_seconds": middle - begin,
        "compile_seconds": time.perf_counter() - middle,
        "processor_seconds": time.process_time(),
    }


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
    rates = {name: [rate for one in found for rate in one["rates"]] for name, found in measured.items()}
    medians = {name: statistics.median(one) for name, one in rates.items()}
    lines = [
        ["", "tokens/s", f"{TIMES} transformers", "first step, s", "peak, GB", "last loss", "first loss differs by"]
    ]
    for name, found in measured.items():
        lines.append(
            [
                name,
                f"{medians[name]:.1f} ({min(rates[name]):.1f} to {max(rates[name]):.1f})",
                f"{medians[name] / medians[REFERENCE]:.2f}",
                f"{statistics.median(one['first_step_seconds'] for one in found):.1f}",
                f"{max(one['peak_bytes'] for one in found) / 1e9:.2f}",
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=6, help="measured steps in each round (6)")
    parser.add_argument("--rounds", type=positive, default=3, help="how often each contender is started (3)")
    parser.add_argument("--json", type=Path, default=None, help="write all figures to this file")
    parser.add_argument("--write", action="store_true", help="put the tables into the README")
    arguments = parser.parse_args()
    # All of them compute on the CPU, compile anew, and look for nothing on a network.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "HF_HUB_OFFLINE": "1"}

    import mistral_eqx as mx
    from mistral_eqx.checkpoint import locate

    file = locate(MODEL)
    ids = mx.load_tokenizer(file).encode(DATA.read_text())
    rows = [ids[start : start + SEQ + 1] for start in range(0, len(ids) - SEQ, SEQ)]
    batches = [rows[start : start + ROWS] for start in range(0, len(rows) - ROWS + 1, ROWS)]
    if arguments.steps >= len(batches):
        parser.error(f"--steps must be less than {len(batches)}, for which {DATA.name} has tokens.")
    with tempfile.TemporaryDirectory(prefix="train-") as temporary:
        folder = Path(temporary) / "float32"
        in_own_process(export, file, folder)
        task = Task(file, folder, batches[: arguments.steps + 1])
        measured, others = in_rounds(measure, {name: (name, task) for name in CONTENDERS}, arguments.rounds, tell)
    shapes = {f"{layers} layers": (layers,) for layers in LAYERS}
    compiling, more_others = in_rounds(measure_compiling, shapes, arguments.rounds, tell_compiling)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "measured": measured,
        "compiling": compiling,
        "differences": differences(measured),
        "others_percent": others + more_others,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.write:
        write(markdown(report), "train")
    print(markdown(report))
    for name, (first, later) in report["differences"].items():
        if first > FIRST_TOLERANCE or later > LATER_TOLERANCE:
            sys.exit(
                f"The losses of {name} differ from those of {REFERENCE} by {first:.1e} in the first step and by up to "
                f"{later:.1e} in later ones: they did not do the same work."
            )


if __name__ == "__main__":
    main()
