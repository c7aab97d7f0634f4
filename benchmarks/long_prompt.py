"""How long does it take to read a long prompt, and how much memory, here and with transformers?

The first token after prompts of several lengths, with the weights of the preset `smollm2-135m` in float32 and rounded
to bfloat16. Each length is read in a process of its own, which tells its peak memory.

    python benchmarks/long_prompt.py --json long_prompt.json
    python benchmarks/long_prompt.py --write

The second puts the table into the README beside this file. Run nothing beside it.
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
    in_rounds,
    keep,
    load_transformers,
    make_report,
    options,
    peak_bytes,
    peak_gb,
    pooled,
    positive,
    prompt_ids,
    table,
    timed,
    use_cpu,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender is given.

    **Attributes:**

    - `weights`: the files.
    - `prompt`: token ids.
    - `repetitions`: how often it is read, in one process.
    """

    weights: Weights
    prompt: list[int]
    repetitions: int


def start_mistral_eqx(task: Task, dtype: str) -> Callable[[], int]:
    import mistral_eqx as mx

    model = mx.load(task.weights.file, dtype=dtype)
    return lambda: int(mx.generate(model, [task.prompt], max_new_tokens=1).tokens[0, 0])


def start_transformers(task: Task, dtype: str) -> Callable[[], int]:
    import torch

    model = load_transformers(task.weights.folder, dtype)
    ids = torch.tensor([task.prompt])
    mask = torch.ones_like(ids)
    return lambda: int(model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)[0, -1])


STARTS = {"transformers": start_transformers, "mistral_eqx": start_mistral_eqx}
CONTENDERS = [(name, dtype) for name in STARTS for dtype in ("float32", "bfloat16")]


def measure(name: str, dtype: str, task: Task) -> dict[str, Any]:
    """One contender in one round: the seconds until the first token, and memory before and after."""
    first = STARTS[name](task, dtype)
    loaded = peak_bytes()
    token = first()
    seconds = [timed(first)[0] for _ in range(task.repetitions)]
    return {"seconds": seconds, "token": token, "loaded_bytes": loaded}


def tell(found: dict[str, Any]) -> str:
    return f"{statistics.median(found['seconds']):6.2f} s, peak {found['peak_bytes'] / 1e9:.2f} GB"


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    lengths, measured = report["lengths"], report["measured"]
    cells = ((f"{length}: first token, s", TIMES, "peak, GB") for length in lengths)
    lines = [["", *(cell for three in cells for cell in three)]]
    medians = {name: statistics.median(pooled(found, "seconds")) for name, found in measured.items()}
    for contender in report["contenders"]:
        line = [contender]
        for length in lengths:
            found = measured[f"{contender}, {length}"]
            seconds, theirs = medians[f"{contender}, {length}"], medians[f"{REFERENCE}, {length}"]
            line += [f"{seconds:.2f}", f"{seconds / theirs:.2f}", peak_gb(found)]
        lines.append(line)
    how = f"Rounds: {report['rounds']}, repetitions in each: {report['repetitions']}; medians of all."
    return f"{table(lines)}\n\n{footnote(report, how)}"


def main():
    parser = options(__doc__, rounds=2, repetitions=2)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1024, 4096, 8000], help="of the prompts")
    arguments = parser.parse_args()
    use_cpu()
    ids = prompt_ids()
    ids *= -(-max(arguments.lengths) // len(ids))
    with exported_weights() as weights:
        starts = {
            f"{' '.join(contender)}, {length}": (*contender, Task(weights, ids[:length], arguments.repetitions))
            for length in arguments.lengths
            for contender in CONTENDERS
        }
        measured, others = in_rounds(measure, starts, arguments.rounds, tell)
    report = make_report(arguments, measured, others, contenders=[" ".join(contender) for contender in CONTENDERS])
    keep(report, markdown(report), "long_prompt", arguments)
    print(markdown(report))


if __name__ == "__main__":
    main()
