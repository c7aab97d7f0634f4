"""How much faster is decoding with proposed tokens, and where?

One row is decoded without proposals, with those of a prompt lookup, and with those of a draft: the model itself, with
its weights rounded to 4 bits. Two tasks: one quotes its prompt, the other writes freely. SmolLM2 quotes greedily,
since its prompt begins a text again, and draws its free text with one key: all contenders write the same tokens. Layers
of Mistral 7B's sizes have random weights, and a constraint has them write a given text, so that they too quote in one
task and not in the other.

    python benchmarks/speculation.py --json speculation.json
    python benchmarks/speculation.py --write

The second puts the table into the README beside this file. Each contender runs in a process of its own, once a round;
run nothing beside it. With 4 layers it needs 1 GB in the temporary folder and 3 GB of memory.
"""

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rounds import (
    MODEL,
    TIMES,
    footnote,
    how_often,
    in_rounds,
    keep,
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


# A passage, its first words again, and a text that has nothing to do with it.
PASSAGE, AGAIN = 200, 24
TASKS = ("quotes", "free")
PLAIN, LOOKUP, DRAFT = "plain", "prompt lookup", "draft"


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender is given.

    **Attributes:**

    - `file`: the weights of the random model; `None` for SmolLM2.
    - `ids`: a text, of which the passage is the beginning.
    - `new_tokens`: how many to decode in each task.
    - `repetitions`: how often, in one process.
    """

    file: Path | None
    ids: list[int]
    new_tokens: int
    repetitions: int


def prompts_of(ids: list[int]) -> dict[str, list[int]]:
    """The prompt of each task."""
    return {"quotes": ids[:PASSAGE] + ids[:AGAIN], "free": ids[PASSAGE : PASSAGE + 32]}


def forced(ids: list[int], vocab: int) -> Any:
    """A processor that allows these tokens only, one after the other."""
    import jax.numpy as jnp

    import mistral_eqx as mx

    text = jnp.asarray([*ids, ids[-1]])

    def allowed(at):
        return jnp.arange(vocab) == text[at]

    def advance(at, token):
        return jnp.minimum(at + 1, len(ids))

    return mx.Constraint(allowed, advance, jnp.zeros((), jnp.int32))


def start(kind: str, dtype: str | None, task: Task) -> Any:
    """A function from a task's name to the result of `generate`."""
    import jax.random as jr

    import mistral_eqx as mx

    model = mx.load(mx.checkpoint.locate(MODEL) if task.file is None else task.file, dtype=dtype)
    proposers = {LOOKUP: mx.PromptLookup, DRAFT: lambda: mx.Draft(mx.quantize(model, mx.GGUF("Q4_0")))}
    proposer, prompts = proposers.get(kind, lambda: None)(), prompts_of(task.ids)
    samplers = {"quotes": mx.Sampler(), "free": mx.Sampler(1.0, top_p=0.95)}
    if task.file is not None:
        # Made once, since other functions would be compiled anew.
        texts = {"quotes": task.ids[AGAIN:], "free": task.ids[PASSAGE + 32 :]}
        for name, text in texts.items():
            samplers[name] = mx.Sampler(processors=[forced(text[: task.new_tokens], model.config.vocab)])

    def generate(name: str) -> Any:
        how = {"max_new_tokens": task.new_tokens, "sampler": samplers[name], "key": jr.key(0), "eos_id": ()}
        out = mx.generate(model, [prompts[name]], **how, speculate=proposer)
        return out.tokens[0].tolist(), out.acceptance

    return generate


def measure(kind: str, dtype: str | None, task: Task) -> dict[str, Any]:
    """One contender in one round: its new tokens a second in each task, prefill included, without the first call."""
    generate, found = start(kind, dtype, task), {}
    for name in TASKS:
        tokens, _ = generate(name)
        calls = [timed(generate, name) for _ in range(task.repetitions)]
        acceptance = calls[-1][1][1]
        found[f"{name} rates"] = [task.new_tokens / seconds for seconds, _ in calls]
        found[f"{name} tokens"] = tokens
        if acceptance is not None:
            found[f"{name} acceptance"] = acceptance.rate
            found[f"{name} a pass"] = (task.new_tokens - 1) / (acceptance.passes + acceptance.steps)
    return found


def tell(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {statistics.median(found[f'{name} rates']):6.1f} tokens/s" for name in TASKS)


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    header = ["model", "proposals"]
    for name in TASKS:
        header += [f"{name}: tokens/s", f"{TIMES} plain", "accepted", "tokens a pass"]
    lines = [[*header, "equal tokens", "peak, GB"]]
    for contender, found in report["measured"].items():
        model, _, kind = contender.rpartition(", ")
        plain, cells, equal = report["measured"][f"{model}, {PLAIN}"], [], 0
        for name in TASKS:
            rates, others = pooled(found, f"{name} rates"), pooled(plain, f"{name} rates")
            cells += [spread(rates, 1), f"{statistics.median(rates) / statistics.median(others):.2f}"]
            accepted, a_pass = found[0].get(f"{name} acceptance"), found[0].get(f"{name} a pass")
            cells += ["", ""] if accepted is None else [f"{100 * accepted:.0f} %", f"{a_pass:.1f}"]
            equal += found[0][f"{name} tokens"] == plain[0][f"{name} tokens"]
        lines.append([model, kind, *cells, f"{equal} of {len(TASKS)}", peak_gb(found)])
    how = (
        f"One row, {report['new_tokens']} new tokens after prompts of {PASSAGE + AGAIN} (quotes) and 32 tokens (free); "
        f"7B layers: {report['layers']}, with an embedding of SmolLM2's vocabulary; {how_often(report)}"
    )
    return f"{table(lines)}\n\n{footnote(report, how)}"


def main():
    parser = options(__doc__)
    parser.add_argument("--layers", type=positive, default=4, help="of Mistral 7B's sizes (4)")
    parser.add_argument("--new-tokens", type=positive, default=128, help="how many tokens to decode in each task (128)")
    arguments = parser.parse_args()
    use_cpu()
    from random_gguf import write_large

    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        file = Path(folder) / "layers.gguf"
        write_large(file, arguments.layers, "Q4_0")
        small = Task(None, prompt_ids(), arguments.new_tokens, arguments.repetitions)
        large = dataclasses.replace(small, file=file)
        contenders = {
            **{f"SmolLM2 float32, {kind}": (kind, "float32", small) for kind in (PLAIN, LOOKUP, DRAFT)},
            **{f"SmolLM2 Q4_1, {kind}": (kind, None, small) for kind in (PLAIN, LOOKUP)},
            **{f"7B layers Q4_0, {kind}": (kind, None, large) for kind in (PLAIN, LOOKUP)},
        }
        measured, others = in_rounds(measure, contenders, arguments.rounds, tell)
    report = make_report(arguments, measured, others)
    keep(report, markdown(report), "speculation", arguments)
    print(markdown(report))


if __name__ == "__main__":
    main()
