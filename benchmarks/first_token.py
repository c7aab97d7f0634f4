"""How long does a large GGUF file take from the start of loading to the first token, here and with llama.cpp?

Both read the same file of random 4-bit weights, whose layers have the sizes of Mistral 7B's. It is in the page cache of
the operating system: each process reads it once before the clock starts, which starts after all imports.

    python benchmarks/first_token.py --json first_token.json
    python benchmarks/first_token.py --write

The second puts the table into the README beside this file. llama-cpp-python takes part if it is installed. Each
contender runs in a process of its own, once a round; run nothing beside it. With 28 layers it needs 4 GB in the
temporary folder (`--folder` names another), and 9 GB of memory.
"""

import functools
import importlib
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from rounds import (
    TIMES,
    Generate,
    Weights,
    find_left_out,
    footnote,
    in_own_process,
    in_rounds,
    keep,
    llama_cpp_notes,
    make_report,
    options,
    peak_gb,
    positive,
    prompt_ids,
    spread,
    table,
    timed,
    use_cpu,
)


TYPE = "Q4_1"
MODULES = {"mistral_eqx": "mistral_eqx", "llama.cpp": "llama_cpp"}
STARTS: dict[str, Callable[[peers.Task], Generate]] = {
    "mistral_eqx": functools.partial(peers.start_mistral_eqx, dtype=None, streamed=False),
    "llama.cpp": peers.start_llama_cpp,
}


def write_file(file: Path, layers: int):
    """Writes the model."""
    from random_gguf import write_large

    write_large(file, layers, TYPE)


def measure(name: str, task: peers.Task) -> dict[str, Any]:
    """One contender in one round: the seconds of loading, of the first token, and of the same token once more."""
    module = importlib.import_module(MODULES[name])
    if name == "mistral_eqx":
        import jax

        jax.devices()
        # The package imports the rest of itself when the first of its names is used.
        assert module.load
    with open(task.weights.file, "rb", buffering=0) as file:
        while file.read(2**24):
            pass
    loading, generate = timed(STARTS[name], task)
    first, again = (timed(generate, task.short, 1)[0] for _ in range(2))
    return {"load_seconds": loading, "first_seconds": loading + first, "again_seconds": loading + again}


def tell(found: dict[str, Any]) -> str:
    return f"{found['first_seconds']:.2f} s, of which {found['load_seconds']:.2f} s to load"


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    size, measured = report["file_bytes"], report["measured"]
    header = ["", "load, s", "first token, s", TIMES, "without compilation, s", TIMES, "peak, GB", f"{TIMES} the file"]
    lines = [header]
    theirs = [one["first_seconds"] for one in measured.get("llama.cpp", [])]
    for name, found in measured.items():
        cells = [name, spread([one["load_seconds"] for one in found], 2)]
        # llama.cpp compiles nothing, but its first token reads the mapped file.
        for figure in ("first_seconds", "again_seconds" if name == "mistral_eqx" else "first_seconds"):
            seconds = [one[figure] for one in found]
            ratio = f"{statistics.median(seconds) / statistics.median(theirs):.2f}" if theirs else ""
            cells += [spread(seconds, 2), ratio]
        lines.append([*cells, peak_gb(found), f"{max(one['peak_bytes'] for one in found) / size:.2f}"])
    how = (
        f"A file of {size / 1e9:.2f} GB, {TYPE}, {report['layers']} layers; a prompt of {peers.SHORT}; rounds: "
        f"{report['rounds']}; medians, with the least and the most."
    )
    return f"{table(lines)}\n\n{footnote(report, how, *llama_cpp_notes(report))}"


def main():
    parser = options(__doc__, repetitions=None)
    parser.add_argument("--layers", type=positive, default=28, help="of the model (28, a file of 4 GB)")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the model; the temporary folder")
    arguments = parser.parse_args()
    use_cpu()
    prompt = prompt_ids()[: peers.SHORT]
    left_out = find_left_out({name: (module,) for name, module in MODULES.items()})
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=arguments.folder) as folder:
        file = Path(folder) / "model.gguf"
        in_own_process(write_file, file, arguments.layers)
        size = file.stat().st_size
        task = peers.Task(Weights(file, Path(folder)), prompt, prompt, 1, 1, arguments.amx)
        contenders = {name: (name, task) for name in MODULES if name not in left_out}
        measured, others = in_rounds(measure, contenders, arguments.rounds, tell)
    report = make_report(arguments, measured, others, left_out=left_out, file_bytes=size)
    keep(report, markdown(report), "first_token", arguments)
    print(markdown(report))


if __name__ == "__main__":
    main()
