"""How fast are the types of a GGUF file, here and with llama.cpp?

Both read the same file, SmolLM2-135M in each type, and keep the weights as they are in it. `Q4_1` is the file of the
preset `smollm2-135m`; the others are written from its weights in float32. Both get the same token ids, decode greedily
and never stop early. Batches and beams, which llama-cpp-python does not have, are compared with float32 here.

    python benchmarks/packed.py --json packed.json
    python benchmarks/packed.py --write
    python benchmarks/packed.py --only Q4_K_M Q8_0

The second puts the table into the README beside this file. llama-cpp-python takes part if it is installed. Each
measurement is in a process of its own, once a round; run nothing beside it.
"""

import dataclasses
import functools
import operator
import statistics
import tempfile
from pathlib import Path
from typing import Any

import batch
import beam
import peers
from rounds import (
    MODEL,
    TIMES,
    Weights,
    equal_tokens,
    find_left_out,
    footnote,
    how_often,
    in_own_process,
    in_rounds,
    keep,
    llama_cpp_notes,
    make_report,
    new_tokens_option,
    options,
    pooled,
    positive,
    prompt_ids,
    spread,
    table,
    use_cpu,
)


OWN = "Q4_1"
TYPES = (OWN, "Q4_K_M", "Q8_0", "BF16", "F32")
ROWS = 8


def write_files(folder: Path, types: list[str]) -> dict[str, Path]:
    """The file of each type; that of the preset is there whatever the types."""
    import mistral_eqx as mx
    from mistral_eqx.checkpoint import locate

    files = {OWN: locate(MODEL)}
    model, tokenizer = mx.load(MODEL, dtype="float32"), mx.load_tokenizer(MODEL)
    for type in types:
        if type != OWN:
            files[type] = folder / f"{type}.gguf"
            mx.save(model, files[type], format="gguf", type=type, tokenizer=tokenizer)
    return files


def of_streams(name: str, task: peers.Task, context: list[int], llama_cpp: bool) -> dict[str, tuple[Any, ...]]:
    """What is measured of one file with one stream: functions and their arguments.

    **Arguments:**

    - `name`: the row.
    - `task`: the file and the prompts.
    - `context`: the tokens after which decoding is measured too.
    - `llama_cpp`: whether it takes part.
    """
    long = dataclasses.replace(task, long=context)
    start = functools.partial(peers.start_mistral_eqx, dtype=None, streamed=False)
    int8 = functools.partial(peers.start_after_prefill, cache_dtype="int8")
    found: dict[str, tuple[Any, ...]] = {
        f"{name}, mistral_eqx": (peers.measure, start, task),
        f"{name}, mistral_eqx, context": (peers.measure_after_prefill, peers.start_after_prefill, long),
        f"{name}, mistral_eqx, context, int8": (peers.measure_after_prefill, int8, long),
    }
    if llama_cpp:
        kept = functools.partial(peers.start_llama_cpp, reads_again=False)
        found[f"{name}, llama.cpp"] = peers.measure, peers.start_llama_cpp, task
        found[f"{name}, llama.cpp, context"] = peers.measure_after_prefill, kept, long
    return found


def of_batches(name: str, task: peers.Task, prompts: list[list[int]], dtype: str | None) -> dict[str, tuple[Any, ...]]:
    """What is measured of one file with several rows: functions and their arguments. The first prompt has beams."""
    batches = batch.Task(task.weights, prompts, task.new_tokens, task.repetitions)
    searches = beam.Task(task.weights, [(prompts[:1], task.new_tokens)], task.repetitions)
    return {
        f"{name}, batch": (batch.measure, "mistral_eqx", dtype, batches),
        f"{name}, beams": (beam.measure, "mistral_eqx", dtype, searches),
    }


def tell(found: dict[str, Any]) -> str:
    if "decode" in found:
        return f"{statistics.median(found['decode']):6.1f} tokens/s"
    scripts = {"decode_after_short": peers, "rates": batch, "seconds": beam}
    return next(script.tell(found) for figure, script in scripts.items() if figure in found)


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    measured, new_tokens, context = report["measured"], report["new_tokens"], report["context_tokens"]

    def beside(mine: list[float], theirs: list[float] | None, digits: int = 1) -> list[str]:
        ratio = "" if theirs is None else f"{statistics.median(mine) / statistics.median(theirs):.2f}"
        return [spread(mine, digits), ratio]

    def figures(name: str, figure: str) -> list[float] | None:
        return pooled(measured[name], figure) if name in measured else None

    def rates(name: str) -> list[float]:
        """Of a search: new tokens of the best text in a second."""
        return [new_tokens / seconds for one in measured[name] for seconds in one["seconds"][0]]

    header = ["", f"tokens/s after a prompt of {peers.SHORT}", f"tokens/s after {context}", "the same, int8 cache"]
    header += [f"first token of {report['prompt_tokens']}, s"]
    lines = [[header[0], *(cell for name in header[1:] for cell in (name, TIMES))]]
    lines[0] += [f"batch of {ROWS}, tokens/s", f"{TIMES} float32", f"{beam.BEAMS} beams, tokens/s", f"{TIMES} float32"]
    lines[0].append("equal tokens")
    for type in report["only"]:
        ours, theirs = f"{type}, mistral_eqx", f"{type}, llama.cpp"
        after = figures(f"{theirs}, context", "decode")
        cells = [
            type,
            *beside(pooled(measured[ours], "decode_after_short"), figures(theirs, "decode_after_short")),
            *beside(pooled(measured[f"{ours}, context"], "decode"), after),
            *beside(pooled(measured[f"{ours}, context, int8"], "decode"), after),
            *beside(pooled(measured[ours], "first_token_seconds"), figures(theirs, "first_token_seconds"), 2),
            *beside(pooled(measured[f"{type}, batch"], "rates"), pooled(measured["float32, batch"], "rates")),
            *beside(rates(f"{type}, beams"), rates("float32, beams")),
        ]
        if theirs in measured:
            tokens = measured[ours][0]["tokens"]
            cells.append(f"{equal_tokens(tokens, measured[theirs][0]['tokens'])} of {len(tokens)}")
        else:
            cells.append("")
        lines.append(cells)
    how = f"{new_tokens} new tokens; {how_often(report)}"
    return f"{table(lines)}\n\n{footnote(report, how, *llama_cpp_notes(report))}"


def main():
    parser = options(__doc__)
    new_tokens_option(parser)
    parser.add_argument("--only", nargs="+", choices=TYPES, default=list(TYPES), help="of the types")
    parser.add_argument("--prompt-tokens", type=positive, default=421, help="the prompt of the first token (421)")
    parser.add_argument("--context-tokens", type=positive, default=3900, help="the length of the context (3900)")
    arguments = parser.parse_args()
    use_cpu()
    ids = prompt_ids()
    if not peers.SHORT <= arguments.prompt_tokens <= len(ids):
        parser.error(f"--prompt-tokens must be from {peers.SHORT} to {len(ids)}, as long as the text in prompt.txt is.")
    context = (ids * (arguments.context_tokens // len(ids) + 1))[: arguments.context_tokens]
    prompts = batch.prompts_of(ids, ROWS)
    left_out = find_left_out({"llama.cpp": ("llama_cpp",)})
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        files = in_own_process(write_files, Path(folder), arguments.only)
        task = peers.Task(
            Weights(files[OWN], Path(folder)),
            ids[: arguments.prompt_tokens],
            ids[: peers.SHORT],
            arguments.new_tokens,
            arguments.repetitions,
            arguments.amx,
        )
        found = of_batches("float32", task, prompts, "float32")
        for type in arguments.only:
            task = dataclasses.replace(task, weights=Weights(files[type], Path(folder)))
            found |= of_streams(type, task, context, not left_out) | of_batches(type, task, prompts, None)
        measured, others = in_rounds(operator.call, found, arguments.rounds, tell)
    report = make_report(arguments, measured, others, left_out=left_out)
    keep(report, markdown(report), "packed", arguments)
    print(markdown(report))


if __name__ == "__main__":
    main()
