"""How fast does one stream decode, and how long until its first token, here and with transformers and llama.cpp?

All read the same weights, those of the preset `smollm2-135m`: the quantised file as it is, or its weights in float32 or
rounded to bfloat16. They get the same token ids, decode greedily and never stop early.

    python benchmarks/peers.py --json peers.json
    python benchmarks/peers.py --write

The second puts the table into the README beside this file. transformers (with torch) and llama-cpp-python take part
if they are installed: `pip install torch==2.13.0 && pip install -e ".[bench]"`.

Each contender runs in a process of its own, which ends before the next one starts, once a round. Rounds follow each
other, so that a machine that slows down does so for all. Run nothing beside it: threads that wait for each other in a
busy loop, as those of llama.cpp do, come to a standstill when one of them has to share its core. The table tells if the
machine was not quiet; its figures are then worth nothing.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any, Literal

from rounds import (
    MODEL,
    REFERENCE,
    TIMES,
    Generate,
    Weights,
    decode,
    equal_tokens,
    exported_weights,
    find_left_out,
    footnote,
    how_often,
    in_rounds,
    keep,
    llama_cpp_notes,
    load_llama_cpp,
    load_transformers,
    make_report,
    new_tokens_option,
    not_quiet,
    options,
    pooled,
    positive,
    prompt_ids,
    table,
    timed,
    use_cpu,
)


# Decoding is also measured after a prompt so short that attention costs next to nothing.
SHORT = 32


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender is given.

    **Attributes:**

    - `weights`: the files.
    - `long`, `short`: the prompts.
    - `new_tokens`: how many tokens to decode after each.
    - `repetitions`: how often, in one process.
    - `amx`: whether llama.cpp may use AMX instructions.
    """

    weights: Weights
    long: list[int]
    short: list[int]
    new_tokens: int
    repetitions: int
    amx: bool = True


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of the table.

    **Attributes:**

    - `name`: what it is called there.
    - `needs`: the modules without which it is left out.
    - `start`: loads the model; runs in the contender's own process.
    """

    name: str
    needs: tuple[str, ...]
    start: Callable[[Task], Generate]


def start_mistral_eqx(task: Task, dtype: str | None, streamed: bool) -> Generate:
    import numpy as np

    import mistral_eqx as mx

    model = mx.load(task.weights.file, dtype=dtype)

    def at_once(ids: list[int], new_tokens: int) -> list[int]:
        return np.asarray(mx.generate(model, [ids], max_new_tokens=new_tokens, eos_id=()).tokens)[0].tolist()

    def one_by_one(ids: list[int], new_tokens: int) -> list[int]:
        return [int(token[0]) for token in mx.stream(model, [ids], max_new_tokens=new_tokens, eos_id=())]

    return one_by_one if streamed else at_once


def start_after_prefill(task: Task, cache_dtype: Literal["int8"] | None = None) -> Generate:
    """With the weights as they are in the file. The long prompt is in a prefix cache, except for its last token."""
    import numpy as np

    import mistral_eqx as mx

    model = mx.load(task.weights.file)
    prefix = mx.prefill(model, task.long[:-1], cache_dtype=cache_dtype)

    def generate(ids: list[int], new_tokens: int) -> list[int]:
        out = mx.generate(model, [ids[-1:]], max_new_tokens=new_tokens, eos_id=(), prefix=prefix)
        return np.asarray(out.tokens)[0].tolist()

    return generate


def start_transformers(task: Task, dtype: str) -> Generate:
    import torch

    model = load_transformers(task.weights.folder, dtype)

    def generate(ids: list[int], new_tokens: int) -> list[int]:
        prompt = torch.tensor([ids])
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False
        )
        return whole[0, len(ids) :].tolist()

    return generate


def start_llama_cpp(task: Task, *, reads_again: bool = True) -> Generate:
    """With `reads_again=False` it finds the prompt of the call before in its cache, and reads only the last token."""
    model = load_llama_cpp(task.weights.file, len(task.long) + task.new_tokens, amx=task.amx)

    def generate(ids: list[int], new_tokens: int) -> list[int]:
        if reads_again:
            model.reset()
        tokens = model.generate(ids, temp=0.0)
        return [next(tokens) for _ in range(new_tokens)]

    return generate


CONTENDERS = (
    *(
        Contender(
            f"transformers {dtype}", ("torch", "transformers"), functools.partial(start_transformers, dtype=dtype)
        )
        for dtype in ("float32", "bfloat16")
    ),
    Contender("llama.cpp, Q4_1 as it is", ("llama_cpp",), start_llama_cpp),
    *(
        Contender(
            f"mistral_eqx {weights}, {'stream' if streamed else 'generate'}",
            (),
            functools.partial(start_mistral_eqx, dtype=dtype, streamed=streamed),
        )
        for dtype, weights in (("float32", "float32"), ("bfloat16", "bfloat16"), (None, "Q4_1 as it is"))
        for streamed in (False, True)
    ),
)


def measure(start: Callable[[Task], Generate], task: Task) -> dict[str, Any]:
    """One contender in one round, in the process that calls this.

    **Returns:** what was measured: a list with one entry a repetition, or a number.
    """

    loading, generate = timed(start, task)
    cold, tokens = timed(generate, task.long, task.new_tokens)
    decode(generate, task.long, task.new_tokens)
    decode(generate, task.short, task.new_tokens)
    after_long = [decode(generate, task.long, task.new_tokens) for _ in range(task.repetitions)]
    after_short = [decode(generate, task.short, task.new_tokens) for _ in range(task.repetitions)]
    return {
        "decode_after_short": [one.rate for one in after_short],
        "decode_after_long": [one.rate for one in after_long],
        "first_token_seconds": [one.first_seconds for one in after_long],
        "compile_seconds": cold - statistics.median(one.whole_seconds for one in after_long),
        "load_seconds": loading,
        "tokens": tokens,
    }


def measure_after_prefill(start: Callable[[Task], Generate], task: Task) -> dict[str, Any]:
    """The rate after the long prompt, which the first call may read and later ones find in the cache.

    A prefill takes as long as many steps of decoding: subtracting it would add its own changes to theirs.
    """
    generate = start(task)
    _, *found = [decode(generate, task.long, task.new_tokens) for _ in range(1 + task.repetitions)]
    return {"decode": [one.rate for one in found]}


def tell(found: dict[str, Any]) -> str:
    return (
        f"{statistics.median(found['decode_after_short']):6.1f} tokens/s, "
        f"first token after {statistics.median(found['first_token_seconds']):.2f} s"
    )


def summary(name: str, rounds: list[dict[str, Any]], reference: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Medians and extremes over all repetitions of all rounds, and the medians' ratios to the reference."""
    result: dict[str, Any] = {"name": name}
    for figure in ("decode_after_short", "decode_after_long", "first_token_seconds"):
        values = pooled(rounds, figure)
        median = statistics.median(values)
        result[figure] = {"median": median, "least": min(values), "most": max(values)}
        if reference is not None:
            result[figure]["ratio"] = median / statistics.median(pooled(reference, figure))
    for figure in ("compile_seconds", "load_seconds", "peak_bytes"):
        result[figure] = statistics.median(found[figure] for found in rounds)
    result["tokens"] = rounds[0]["tokens"]
    if reference is not None:
        result["equal_tokens"] = equal_tokens(result["tokens"], reference[0]["tokens"])
    return result


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    long, short = report["prompt_tokens"], report["short_prompt_tokens"]
    header = [
        "",
        f"tokens/s after a prompt of {short}",
        TIMES,
        f"tokens/s after {long}",
        TIMES,
        f"first token of {long}, s",
        TIMES,
        "compile, s",
        "peak, GB",
        "equal tokens",
    ]
    lines = [header]
    for row in report["contenders"]:
        cells = [row["name"]]
        for figure, digits in (("decode_after_short", 1), ("decode_after_long", 1), ("first_token_seconds", 2)):
            found = row[figure]
            spread = f"{found['least']:.{digits}f} to {found['most']:.{digits}f}"
            cells += [f"{found['median']:.{digits}f} ({spread})", f"{found['ratio']:.2f}" if "ratio" in found else ""]
        cells += [f"{max(row['compile_seconds'], 0.0):.1f}", f"{row['peak_bytes'] / 1e9:.2f}"]
        cells.append(f"{row['equal_tokens']} of {len(row['tokens'])}" if "equal_tokens" in row else "")
        lines.append(cells)
    return "\n\n".join(
        [
            table(lines),
            footnote(
                report,
                f"{report['new_tokens']} new tokens; {how_often(report)}",
                *llama_cpp_notes(report),
            ),
        ]
    )


def show(report: dict[str, Any]):
    """For the terminal: the figures, and how each text goes on."""
    from rich.console import Console
    from rich.table import Table

    import mistral_eqx as mx

    long, short = report["prompt_tokens"], report["short_prompt_tokens"]
    shown = Table(caption="medians; in brackets the ratio to transformers float32")
    for column in ("", f"tok/s after {short}", f"tok/s after {long}", f"first token of {long}", "compile", "peak"):
        shown.add_column(column, justify="right" if column else "left", no_wrap=not column)

    def cell(found: dict[str, float], digits: int, unit: str = "") -> str:
        return f"{found['median']:.{digits}f}{unit}" + (f" ({found['ratio']:.2f})" if "ratio" in found else "")

    for row in report["contenders"]:
        shown.add_row(
            row["name"],
            cell(row["decode_after_short"], 1),
            cell(row["decode_after_long"], 1),
            cell(row["first_token_seconds"], 2, " s"),
            f"{max(row['compile_seconds'], 0.0):.1f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
        )
    console, decode = Console(), mx.load_tokenizer(MODEL).decode
    console.print(shown)
    if warning := not_quiet(report):
        console.print(warning)
    for row in report["contenders"]:
        equal = f"{row['equal_tokens']} of {len(row['tokens'])} equal" if "equal_tokens" in row else ""
        console.print(
            f"{row['name']:28} {equal:15} {decode(row['tokens'][:10])!r}", markup=False, highlight=False, soft_wrap=True
        )


def main():
    parser = options(__doc__)
    new_tokens_option(parser)
    parser.add_argument("--prompt-tokens", type=positive, default=400, help="the length of the long prompt (400)")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    arguments = parser.parse_args()
    use_cpu()
    ids = prompt_ids()
    if not SHORT <= arguments.prompt_tokens <= len(ids):
        parser.error(f"--prompt-tokens must be from {SHORT} to {len(ids)}, as long as the text in prompt.txt is.")
    missing = find_left_out({one.name: one.needs for one in CONTENDERS})
    with exported_weights() as weights:
        task = Task(
            weights=weights,
            long=ids[: arguments.prompt_tokens],
            short=ids[:SHORT],
            new_tokens=arguments.new_tokens,
            repetitions=arguments.repetitions,
            amx=arguments.amx,
        )
        starts = {one.name: (one.start, task) for one in CONTENDERS if one.name not in missing}
        measured, others = in_rounds(measure, starts, arguments.rounds, tell)
    report = make_report(
        arguments,
        measured,
        others,
        short_prompt_tokens=SHORT,
        left_out=missing,
        contenders=[summary(name, rounds, measured.get(REFERENCE)) for name, rounds in measured.items()],
    )
    keep(report, markdown(report), "peers", arguments)
    if arguments.markdown:
        print(markdown(report))
    else:
        show(report)
    for row in report["contenders"]:
        if row["name"].startswith("mistral_eqx float32") and row.get("equal_tokens", task.new_tokens) < task.new_tokens:
            sys.exit(f"{row['name']} decoded other tokens than {REFERENCE} did: two different models were measured.")


if __name__ == "__main__":
    main()
