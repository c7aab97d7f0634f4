"""What does a mixture of experts cost beside a dense model of the same active weights?

Random models: one has 8 experts of which each token takes 2, the other a feed-forward layer as wide as these 2
together. The script measures decoding of both in several types of a GGUF file, in quantized types also with llama.cpp
on the same file, and the first token after a prompt of 512 tokens in float32, here and with transformers.

    python benchmarks/experts.py --json experts.json
    python benchmarks/experts.py --write

The second puts the table into the README beside this file. transformers (with torch) and llama-cpp-python take part
if they are installed. Each measurement is in a process of its own, once a round; run nothing beside it. With the
default sizes it needs 5 GB in the temporary folder (`--folder` names another), and 3 GB of memory.
"""

import dataclasses
import functools
import operator
import statistics
import tempfile
from pathlib import Path
from typing import Any

import long_prompt
import peers
from rounds import (
    MODEL,
    REFERENCE,
    TIMES,
    Weights,
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


TYPES = ("F32", "BF16", "Q4_1", "Q8_0")
FLOATS = ("F32", "BF16")
EXPERTS, PER_TOKEN = 8, 2
PREFILLS = {REFERENCE: "transformers", "mistral_eqx float32": "mistral_eqx"}


def write_files(folder: Path, types: list[str], layers: int, embed: int, hidden: int) -> dict[str, dict[str, Path]]:
    """Of each type the file of a model with experts and of a dense one; and the first in float32 for transformers."""
    from random_gguf import write_random

    import mistral_eqx as mx

    tokenizer = mx.load_tokenizer(MODEL)
    base = dataclasses.replace(
        mx.PRESETS["8x7b"],
        vocab=tokenizer.vocab,
        embed=embed,
        hidden=hidden,
        layers=layers,
        windows=(None,) * layers,
        kv_heads=max(1, embed // 512),
        q_per_kv=4,
        head_dim=128,
        tied=True,
        routing=mx.Routing(EXPERTS, PER_TOKEN),
    )
    configs = {"experts": base, "dense": dataclasses.replace(base, hidden=PER_TOKEN * hidden, routing=None)}
    files: dict[str, dict[str, Path]] = {}
    for type in dict.fromkeys([*types, "F32"]):
        files[type] = {kind: folder / f"{kind}-{type}.gguf" for kind in configs}
        for kind, config in configs.items():
            write_random(files[type][kind], config, type, tokenizer)
    mx.save(mx.load(files["F32"]["experts"]), folder / "float32")
    return files


def tell(found: dict[str, Any]) -> str:
    if "decode" in found:
        return f"{statistics.median(found['decode']):.2f} tokens/s"
    return long_prompt.tell(found)


def markdown(report: dict[str, Any]) -> str:
    """The tables and what one must know to read them."""
    measured = report["measured"]
    header = ["weights", "experts, tokens/s", "dense, tokens/s", f"time, {TIMES} dense"]
    lines = [[*header, "llama.cpp, experts, tokens/s", f"{TIMES} llama.cpp"]]
    for type in report["only"]:
        experts, dense = (pooled(measured[f"{type}, {kind}"], "decode") for kind in ("experts", "dense"))
        median = statistics.median(experts)
        cells = [type, spread(experts, 2), spread(dense, 2), f"{statistics.median(dense) / median:.2f}"]
        if (found := measured.get(f"{type}, llama.cpp")) is None:
            lines.append([*cells, "", ""])
        else:
            theirs = pooled(found, "decode")
            lines.append([*cells, spread(theirs, 2), f"{median / statistics.median(theirs):.2f}"])
    prefills = {name: pooled(measured[name], "seconds") for name in PREFILLS if name in measured}
    rows = [["", f"first token after {report['prompt_tokens']}, s", f"{TIMES} transformers"]]
    for name, seconds in prefills.items():
        theirs = prefills.get(REFERENCE)
        ratio = "" if theirs is None else f"{statistics.median(seconds) / statistics.median(theirs):.2f}"
        rows.append([name, spread(seconds, 2), ratio])
    how = (
        f"{report['layers']} layers, embed {report['embed']}, {EXPERTS} experts of hidden {report['hidden']}, "
        f"{PER_TOKEN} for each token; {report['new_tokens']} new tokens after a prompt of {peers.SHORT}; "
        f"{how_often(report)}"
    )
    return f"{table(lines)}\n\n{table(rows)}\n\n{footnote(report, how, *llama_cpp_notes(report))}"


def main():
    parser = options(__doc__)
    new_tokens_option(parser)
    parser.add_argument("--only", nargs="+", choices=TYPES, default=list(TYPES), help="of the types")
    parser.add_argument("--layers", type=positive, default=4, help="of the models (4)")
    parser.add_argument("--embed", type=positive, default=1024, help="a multiple of 512 (1024)")
    parser.add_argument("--hidden", type=positive, default=3584, help="of an expert (3584)")
    parser.add_argument("--prompt-tokens", type=positive, default=512, help="the prompt of the first token (512)")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the models; the temporary folder")
    arguments = parser.parse_args()
    use_cpu()
    ids = prompt_ids()
    long = (ids * -(-arguments.prompt_tokens // len(ids)))[: arguments.prompt_tokens]
    left_out = find_left_out({"llama.cpp": ("llama_cpp",), REFERENCE: ("torch", "transformers")})
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=arguments.folder) as temporary:
        folder = Path(temporary)
        sizes = arguments.layers, arguments.embed, arguments.hidden
        files = in_own_process(write_files, folder, arguments.only, *sizes)
        contenders: dict[str, tuple[Any, ...]] = {}
        for type in arguments.only:
            tasks = {
                kind: peers.Task(
                    Weights(file, folder / "float32"),
                    ids[: peers.SHORT],
                    ids[: peers.SHORT],
                    arguments.new_tokens,
                    arguments.repetitions,
                    arguments.amx,
                )
                for kind, file in files[type].items()
            }
            for kind, task in tasks.items():
                contenders[f"{type}, {kind}"] = peers.measure_after_prefill, peers.start_after_prefill, task
            if type not in FLOATS and "llama.cpp" not in left_out:
                start = functools.partial(peers.start_llama_cpp, reads_again=False)
                contenders[f"{type}, llama.cpp"] = peers.measure_after_prefill, start, tasks["experts"]
        prefill = long_prompt.Task(Weights(files["F32"]["experts"], folder / "float32"), long, arguments.repetitions)
        for name, program in PREFILLS.items():
            if name not in left_out:
                contenders[name] = long_prompt.measure, program, "float32", prefill
        measured, others = in_rounds(operator.call, contenders, arguments.rounds, tell)
    report = make_report(arguments, measured, others, left_out=left_out)
    keep(report, markdown(report), "experts", arguments)
    print(markdown(report))


if __name__ == "__main__":
    main()
