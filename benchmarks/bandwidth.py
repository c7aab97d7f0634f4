"""How close is decoding to the bandwidth of the memory, here and with llama.cpp?

A step of decoding reads all weights once, so that it takes at least as long as this. The script measures how fast all
cores together read an array, and how fast random models decode whose layers have the sizes of Mistral 7B's. Both are
much larger than the caches of a processor. Both programs read the same GGUF file.

    python benchmarks/bandwidth.py --json bandwidth.json
    python benchmarks/bandwidth.py --write

The second puts the table into the README beside this file. llama-cpp-python takes part if it is installed. Each
measurement is in a process of its own, once a round; run nothing beside it. With 8 layers it needs 9 GB in the
temporary folder (`--folder` names another) and as much memory.
"""

import functools
import operator
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peers
from rounds import (
    TIMES,
    Generate,
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
    timed,
    usable_cores,
    use_cpu,
)


TYPES = ("Q4_1", "Q4_K", "Q8_0", "BF16")
MEMORY = "memory"


def write_files(folder: Path, types: list[str], layers: int) -> dict[str, tuple[Path, int]]:
    """The file of each type, and the bytes of its weights. A step reads all: the embedding is also the head."""
    from random_gguf import write_large

    from mistral_eqx.checkpoint import open_checkpoint

    files = {type: folder / f"{type}.gguf" for type in types}
    for type, file in files.items():
        write_large(file, layers, type)
    return {
        type: (file, sum(tensor.nbytes for tensor in open_checkpoint(file).tensors.values()))
        for type, file in files.items()
    }


def measure_memory(nbytes: int, repetitions: int) -> dict[str, Any]:
    """The bytes a second that all cores read: the maximum of floats is numpy's fastest reduction."""
    import numpy as np

    numbers = np.ones(nbytes // 4, np.float32)
    shards = np.array_split(numbers, usable_cores())
    with ThreadPoolExecutor(len(shards)) as pool:
        reads = [timed(lambda: list(pool.map(np.max, shards))) for _ in range(1 + repetitions)]
    return {"bandwidth": [numbers.nbytes / seconds for seconds, _ in reads[1:]]}


def tell(found: dict[str, Any]) -> str:
    if "bandwidth" in found:
        return f"{max(found['bandwidth']) / 1e9:.1f} GB/s"
    return f"{statistics.median(found['decode']):.2f} tokens/s"


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    measured = report["measured"]
    read = pooled(measured[MEMORY], "bandwidth")
    header = ["weights", "read for a token, GB"]
    for name in ("mistral_eqx", "llama.cpp"):
        header += [f"{name}, tokens/s", "GB/s", "of the bandwidth"]
    lines = [[*header, f"{TIMES} llama.cpp"]]
    for type, nbytes in report["weight_bytes"].items():
        cells, medians = [type, f"{nbytes / 1e9:.2f}"], []
        for name in ("mistral_eqx", "llama.cpp"):
            if (found := measured.get(f"{type}, {name}")) is None:
                cells += [""] * 3
                continue
            rates = pooled(found, "decode")
            medians.append(statistics.median(rates))
            speed = medians[-1] * nbytes
            cells += [spread(rates, 2), f"{speed / 1e9:.1f}", f"{100 * speed / max(read):.0f} %"]
        lines.append([*cells, f"{medians[0] / medians[1]:.2f}" if len(medians) == 2 else ""])
    how = (
        f"All cores read {report['read_bytes'] / 2**30:.0f} GiB with {max(read) / 1e9:.1f} GB/s at best, "
        f"{statistics.median(read) / 1e9:.1f} GB/s in the median. {report['layers']} layers; "
        f"{report['new_tokens']} new tokens after a prompt of {peers.SHORT}; {how_often(report)}"
    )
    return f"{table(lines)}\n\n{footnote(report, how, *llama_cpp_notes(report))}"


def main():
    parser = options(__doc__)
    new_tokens_option(parser)
    parser.add_argument("--only", nargs="+", choices=TYPES, default=list(TYPES), help="of the types")
    parser.add_argument("--layers", type=positive, default=8, help="of the models (8)")
    parser.add_argument("--read-bytes", type=positive, default=2**31, help="the size of the array (2 GiB)")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the models; the temporary folder")
    arguments = parser.parse_args()
    use_cpu()
    prompt = prompt_ids()[: peers.SHORT]
    starts: dict[str, Callable[[peers.Task], Generate]] = {"mistral_eqx": peers.start_after_prefill}
    if not (left_out := find_left_out({"llama.cpp": ("llama_cpp",)})):
        starts["llama.cpp"] = functools.partial(peers.start_llama_cpp, reads_again=False)
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=arguments.folder) as folder:
        files = in_own_process(write_files, Path(folder), arguments.only, arguments.layers)
        contenders: dict[str, tuple[Any, ...]] = {MEMORY: (measure_memory, arguments.read_bytes, arguments.repetitions)}
        how = (prompt, prompt, arguments.new_tokens, arguments.repetitions, arguments.amx)
        for type, (file, _) in files.items():
            task = peers.Task(Weights(file, Path(folder)), *how)
            contenders |= {
                f"{type}, {name}": (peers.measure_after_prefill, start, task) for name, start in starts.items()
            }
        measured, others = in_rounds(operator.call, contenders, arguments.rounds, tell)
    report = make_report(
        arguments,
        measured,
        others,
        left_out=left_out,
        weight_bytes={type: nbytes for type, (_, nbytes) in files.items()},
    )
    keep(report, markdown(report), "bandwidth", arguments)
    print(markdown(report))


if __name__ == "__main__":
    main()
