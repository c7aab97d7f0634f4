"""How fast does a batch decode, here and with transformers?

Greedy continuations of several prompts at once, with the weights of the preset `smollm2-135m` in float32 and rounded to
bfloat16. No text ends early.

    python benchmarks/batch.py --json batch.json
    python benchmarks/batch.py --write

The second puts the table into the README beside this file. Each contender runs in a process of its own, once a round;
run nothing beside it.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import MODEL, TEXT
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


PROMPT = 32

Generate = Callable[[int], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender is given.

    **Attributes:**

    - `file`: the GGUF file.
    - `folder`: its weights in float32, as transformers reads them.
    - `prompts`: one a row.
    - `new_tokens`: how many to decode in each row.
    - `repetitions`: how often, in one process.
    """

    file: Path
    folder: Path
    prompts: list[list[int]]
    new_tokens: int
    repetitions: int


def start_mistral_eqx(task: Task, dtype: str) -> Generate:
    import numpy as np

    import mistral_eqx as mx

    model = mx.load(task.file, dtype=dtype)
    return lambda new: np.asarray(mx.generate(model, task.prompts, max_new_tokens=new).tokens).tolist()


def start_transformers(task: Task, dtype: str) -> Generate:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(usable_cores())
    model = transformers.AutoModelForCausalLM.from_pretrained(task.folder, dtype=getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    ids = torch.tensor(task.prompts)
    mask = torch.ones_like(ids)

    def generate(new: int) -> list[list[int]]:
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, PROMPT:].tolist()

    return generate


STARTS = {"transformers": start_transformers, "mistral_eqx": start_mistral_eqx}
CONTENDERS = [(name, dtype) for name in STARTS for dtype in ("float32", "bfloat16")]


def measure(name: str, dtype: str, task: Task) -> dict[str, Any]:
    """One contender in one round: its new tokens a second, the reading of the prompts included."""
    generate = STARTS[name](task, dtype)
    tokens = generate(task.new_tokens)
    rates = []
    for _ in range(task.repetitions):
        begin = time.perf_counter()
        tokens = generate(task.new_tokens)
        rates.append(len(tokens) * task.new_tokens / (time.perf_counter() - begin))
    return {
        "rates": rates,
        "tokens": tokens,
        "peak_bytes": peak_bytes(),
        "processor_seconds": time.process_time(),
    }


def tell(found: dict[str, Any]) -> str:
    return f"{statistics.median(found['rates']):6.1f} tokens/s"


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    measured = report["measured"]
    rates = {name: [rate for one in found for rate in one["rates"]] for name, found in measured.items()}
    medians = {name: statistics.median(one) for name, one in rates.items()}
    best = max(median for name, median in medians.items() if name.startswith("transformers"))
    reference = measured["transformers float32"][0]["tokens"]
    lines = [["", "tokens/s", f"{TIMES} the better transformers", "peak, GB", "rows with equal tokens"]]
    for name, found in measured.items():
        equal = sum(row == other for row, other in zip(found[0]["tokens"], reference, strict=True))
        lines.append(
            [
                name,
                f"{medians[name]:.1f} ({min(rates[name]):.1f} to {max(rates[name]):.1f})",
                f"{medians[name] / best:.2f}",
                f"{max(one['peak_bytes'] for one in found) / 1e9:.2f}",
                f"{equal} of {len(reference)}",
            ]
        )
    how = (
        f"{len(reference)} prompts of {PROMPT} tokens, {len(reference[0])} new ones each; rounds: {report['rounds']}, "
        f"repetitions in each: {report['repetitions']}; medians of all, with the least and the most."
    )
    return f"{table(lines)}\n\n{footnote(report, how)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="how many prompts (8)")
    parser.add_argument("--new-tokens", type=int, default=64, help="how many tokens to decode in each row (64)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender is started (3)")
    parser.add_argument("--repetitions", type=int, default=3, help="measurements in each round (3)")
    parser.add_argument("--json", type=Path, default=None, help="write all figures to this file")
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    arguments = parser.parse_args()
    # All of them compute on the CPU, compile anew, and look for nothing on a network.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "HF_HUB_OFFLINE": "1"}

    import mistral_eqx as mx
    from mistral_eqx.checkpoint import locate

    file = locate(MODEL)
    ids = mx.load_tokenizer(file).encode(" ".join(TEXT.split()))
    prompts = [ids[start : start + PROMPT] for start in range(0, 20 * arguments.batch, 20)]
    with tempfile.TemporaryDirectory(prefix="batch-") as temporary:
        folder = Path(temporary) / "float32"
        in_own_process(export, file, folder)
        task = Task(file, folder, prompts, arguments.new_tokens, arguments.repetitions)
        starts = {" ".join(contender): (*contender, task) for contender in CONTENDERS}
        measured, others = in_rounds(measure, starts, arguments.rounds, tell)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "rounds": arguments.rounds,
        "repetitions": arguments.repetitions,
        "measured": measured,
        "others_percent": others,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.write:
        write(markdown(report), "batch")
    print(markdown(report))


if __name__ == "__main__":
    main()
