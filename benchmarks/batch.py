"""How fast does a batch decode, here and with transformers?

Greedy continuations of several prompts at once, with the weights of the preset `smollm2-135m` in float32 and rounded to
bfloat16. No text ends early.

    python benchmarks/batch.py --json batch.json
    python benchmarks/batch.py --write

The second puts the table into the README beside this file. Each contender runs in a process of its own, once a round;
run nothing beside it.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from rounds import (
    REFERENCE,
    TIMES,
    Weights,
    exported_weights,
    footnote,
    how_often,
    in_rounds,
    keep,
    load_transformers,
    make_report,
    options,
    peak_gb,
    pooled,
    positive,
    prompt_ids,
    spread,
    table,
    timed,
    use_cpu,
)


PROMPT = 32

Generate = Callable[[int], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender is given.

    **Attributes:**

    - `weights`: the files.
    - `prompts`: one a row.
    - `new_tokens`: how many to decode in each row.
    - `repetitions`: how often, in one process.
    """

    weights: Weights
    prompts: list[list[int]]
    new_tokens: int
    repetitions: int


def start_mistral_eqx(task: Task, dtype: str | None) -> Generate:
    import numpy as np

    import mistral_eqx as mx

    model = mx.load(task.weights.file, dtype=dtype)
    return lambda new: np.asarray(mx.generate(model, task.prompts, max_new_tokens=new, eos_id=()).tokens).tolist()


def start_transformers(task: Task, dtype: str) -> Generate:
    import torch

    model = load_transformers(task.weights.folder, dtype)
    ids = torch.tensor(task.prompts)
    mask = torch.ones_like(ids)

    def generate(new: int) -> list[list[int]]:
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, PROMPT:].tolist()

    return generate


STARTS = {"transformers": start_transformers, "mistral_eqx": start_mistral_eqx}
CONTENDERS = [(name, dtype) for name in STARTS for dtype in ("float32", "bfloat16")]


def measure(name: str, dtype: str | None, task: Task) -> dict[str, Any]:
    """One contender in one round: its new tokens a second, prefill included, without the first call."""
    generate = STARTS[name](task, dtype)
    tokens = generate(task.new_tokens)
    calls = [timed(generate, task.new_tokens) for _ in range(task.repetitions)]
    return {"rates": [len(tokens) * task.new_tokens / seconds for seconds, _ in calls], "tokens": tokens}


def prompts_of(ids: list[int], count: int) -> list[list[int]]:
    """Prompts that overlap, from one text."""
    return [ids[start : start + PROMPT] for start in range(0, 20 * count, 20)]


def tell(found: dict[str, Any]) -> str:
    return f"{statistics.median(found['rates']):6.1f} tokens/s"


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    measured = report["measured"]
    rates = {name: pooled(found, "rates") for name, found in measured.items()}
    medians = {name: statistics.median(one) for name, one in rates.items()}
    best = max(median for name, median in medians.items() if name.startswith("transformers"))
    reference = measured[REFERENCE][0]["tokens"]
    lines = [["", "tokens/s", f"{TIMES} the better transformers", "peak, GB", "rows with equal tokens"]]
    for name, found in measured.items():
        equal = sum(row == other for row, other in zip(found[0]["tokens"], reference, strict=True))
        lines.append(
            [
                name,
                spread(rates[name], 1),
                f"{medians[name] / best:.2f}",
                peak_gb(found),
                f"{equal} of {len(reference)}",
            ]
        )
    how = f"{len(reference)} prompts of {PROMPT} tokens, {len(reference[0])} new ones each; {how_often(report)}"
    return f"{table(lines)}\n\n{footnote(report, how)}"


def main():
    parser = options(__doc__)
    parser.add_argument("--batch", type=positive, default=8, help="how many prompts (8)")
    parser.add_argument("--new-tokens", type=positive, default=64, help="how many tokens to decode in each row (64)")
    arguments = parser.parse_args()
    use_cpu()
    prompts = prompts_of(prompt_ids(), arguments.batch)
    with exported_weights() as weights:
        task = Task(weights, prompts, arguments.new_tokens, arguments.repetitions)
        starts = {" ".join(contender): (*contender, task) for contender in CONTENDERS}
        measured, others = in_rounds(measure, starts, arguments.rounds, tell)
    report = make_report(arguments, measured, others)
    keep(report, markdown(report), "batch", arguments)
    print(markdown(report))


if __name__ == "__main__":
    main()
