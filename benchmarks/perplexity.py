"""Is the perplexity of a text what transformers and llama.cpp say it is, and how long does each take?

All score the same tokens of the beginning of Moby-Dick in the same windows, with the weights of the preset
`smollm2-135m`: llama.cpp the quantised file as it is, the others its weights in float32 or rounded to bfloat16.

    python benchmarks/perplexity.py --json perplexity.json
    python benchmarks/perplexity.py --write

The second puts the table into the README beside this file. Each contender runs in a process of its own, once a round.
Whoever is not installed is left out.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rounds import (
    MODEL,
    REFERENCE,
    Weights,
    exported_weights,
    footnote,
    in_rounds,
    keep,
    load_llama_cpp,
    load_transformers,
    make_report,
    options,
    peak_gb,
    positive,
    spread,
    table,
    timed,
    use_cpu,
)


BOOK = Path(__file__).parents[1] / "examples/data/moby-dick.txt"

# From a window's tokens and the number of the last that are scored to the sum of their log-probabilities.
Score = Callable[[list[int], int], float]


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender is given.

    **Attributes:**

    - `weights`: the files.
    - `text`, `ids`: what is scored.
    - `context`, `stride`: the windows.
    - `amx`: whether llama.cpp may use AMX instructions.
    """

    weights: Weights
    text: str
    ids: list[int]
    context: int
    stride: int
    amx: bool

    def windows(self) -> Iterator[tuple[list[int], int]]:
        """Each window, and how many of its last tokens are scored in it."""
        end = 0
        for begin in range(0, len(self.ids), self.stride):
            before, end = end, min(begin + self.context, len(self.ids))
            yield self.ids[begin:end], end - max(before, begin + 1)
            if end == len(self.ids):
                return


def run_mistral_eqx(task: Task, dtype: str) -> Callable[[], tuple[float, int]]:
    import mistral_eqx as mx

    model, tokenizer = mx.load(task.weights.file, dtype=dtype), mx.load_tokenizer(task.weights.file)

    def run() -> tuple[float, int]:
        found = mx.perplexity(model, tokenizer, task.text, context=task.context, stride=task.stride)
        return found.log_prob, found.tokens

    return run


def over_windows(task: Task, score: Score) -> Callable[[], tuple[float, int]]:
    def run() -> tuple[float, int]:
        return sum(score(*window) for window in task.windows()), sum(scored for _, scored in task.windows())

    return run


def run_transformers(task: Task, dtype: str) -> Callable[[], tuple[float, int]]:
    import torch

    model = load_transformers(task.weights.folder, dtype)

    def score(ids: list[int], scored: int) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -scored - 1 : -1].float()
        return -torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-scored:]), reduction="sum").item()

    return over_windows(task, score)


def run_llama_cpp(task: Task, _: str) -> Callable[[], tuple[float, int]]:
    import numpy as np

    model = load_llama_cpp(task.weights.file, task.context, amx=task.amx, n_batch=task.context, logits_all=True)

    def score(ids: list[int], scored: int) -> float:
        model.reset()
        model.eval(ids)
        logits = np.asarray(model.scores[len(ids) - scored - 1 : len(ids) - 1], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(scored), ids[-scored:]]
        return float((chosen - np.log(np.exp(logits).sum(axis=1))).sum())

    return over_windows(task, score)


RUNS = {
    "transformers": (run_transformers, "transformers", ("float32", "bfloat16")),
    "llama.cpp, Q4_1 as it is": (run_llama_cpp, "llama_cpp", ("",)),
    "mistral_eqx": (run_mistral_eqx, "mistral_eqx", ("float32", "bfloat16")),
}


def measure(name: str, dtype: str, task: Task) -> dict[str, Any]:
    """One contender in one round: the first run compiles, the second is timed."""
    run = RUNS[name][0](task, dtype)
    run()
    seconds, (log_prob, tokens) = timed(run)
    return {"log_prob": log_prob, "tokens": tokens, "seconds": seconds}


def perplexity(found: dict[str, Any]) -> float:
    return math.exp(-found["log_prob"] / found["tokens"])


def tell(found: dict[str, Any]) -> str:
    return f"perplexity {perplexity(found):.4f} of {found['tokens']} tokens in {found['seconds']:.1f} s"


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    measured = report["measured"]
    reference = measured.get(REFERENCE)
    lines = [["", "perplexity", "relative to transformers float32", "tokens/s", "peak, GB"]]
    for name, found in measured.items():
        rates = [one["tokens"] / one["seconds"] for one in found]
        relative = f"{perplexity(found[0]) / perplexity(reference[0]) - 1:+.6f}" if reference else ""
        lines.append(
            [
                name,
                f"{perplexity(found[0]):.4f}",
                relative,
                spread(rates, 0),
                peak_gb(found),
            ]
        )
    tokens = {one["tokens"] for found in measured.values() for one in found}
    how = (
        f"{' or '.join(map(str, tokens))} tokens scored in windows of {report['context']}, one every "
        f"{report['stride']}; rounds: {report['rounds']}; medians, with the least and the most."
    )
    return f"{table(lines)}\n\n{footnote(report, how)}"


def main():
    parser = options(__doc__, repetitions=None)
    parser.add_argument("--characters", type=positive, default=9000, help="of the book, how many are scored (9000)")
    parser.add_argument("--context", type=positive, default=512, help="tokens of a window (512)")
    parser.add_argument("--stride", type=positive, default=256, help="from one window to the next (256)")
    arguments = parser.parse_args()
    use_cpu()

    import mistral_eqx as mx

    text = BOOK.read_text(encoding="utf-8")[: arguments.characters]
    ids = mx.load_tokenizer(MODEL).encode(text)
    with exported_weights() as weights:
        task = Task(weights, text, ids, arguments.context, arguments.stride, arguments.amx)
        starts = {
            f"{name} {dtype}".strip(): (name, dtype, task)
            for name, (_, package, dtypes) in RUNS.items()
            if importlib.util.find_spec(package)
            for dtype in dtypes
        }
        measured, others = in_rounds(measure, starts, arguments.rounds, tell)
    report = make_report(arguments, measured, others)
    keep(report, markdown(report), "perplexity", arguments)
    print(markdown(report))


if __name__ == "__main__":
    main()
