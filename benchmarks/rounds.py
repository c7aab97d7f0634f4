"""What the benchmarks share: contenders in processes of their own, round after round, and a table in the README."""

import importlib.metadata
import multiprocessing
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil


# A machine is quiet as long as other programs take no more of its processors than this.
QUIET_PERCENT = 5.0
README = Path(__file__).with_name("README.md")
TIMES = "\N{MULTIPLICATION SIGN}"


def in_rounds(
    measure: Callable[..., dict[str, Any]],
    contenders: dict[str, tuple[Any, ...]],
    rounds: int,
    tell: Callable[[dict[str, Any]], str],
) -> tuple[dict[str, list[dict[str, Any]]], list[float]]:
    """Measures all contenders so often; each round begins with another, so that none always follows the same one.

    **Arguments:**

    - `measure`: called in a process of its own; its result has `"processor_seconds"` among its figures.
    - `contenders`: the arguments for each, by name.
    - `tell`: a result in words, for the terminal.

    **Returns:** the results of each contender, and how many percent of the machine others took in each measurement.
    """
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    names, others = list(contenders), []
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begin, before = time.perf_counter(), machine_seconds() - time.process_time()
            found = in_own_process(measure, *contenders[name])
            taken = machine_seconds() - time.process_time() - before - found["processor_seconds"]
            others.append(100 * taken / ((os.cpu_count() or 1) * (time.perf_counter() - begin)))
            measured[name].append(found)
            print(f"round {number + 1} of {rounds}: {name:28} {tell(found)}", file=sys.stderr)
    return measured, others


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new Python that ends with the call."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes() -> int:
    """The most memory that this process has had, pages of mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not what getrusage tells: there a process begins with the peak of the one that started it.
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM"))
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine_seconds() -> float:
    """The processor time that all programs of this machine together have used, or had taken away by its host."""
    times = psutil.cpu_times()._asdict()
    # Linux counts the time of guests as time of their hosts too.
    return sum(times.values()) - sum(times.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))


def machine() -> dict[str, Any]:
    """What the figures depend on, besides the programs."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.open() if line.startswith("model name")]
        name = names[0] if names else name
    return {
        "processor": name,
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    found = {}
    for package in ("mistral-eqx", "jax", "equinox", "torch", "transformers", "llama-cpp-python"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def export(file: Path, folder: Path):
    """Writes the weights that transformers reads: by itself it would need `accelerate` for a GGUF file."""
    import mistral_eqx as mx

    mx.save(mx.load(file, dtype="float32"), folder)


def table(lines: Iterable[Iterable[str]]) -> str:
    """Markdown: the first line is the header, and of each line the first cell stands on the left."""
    (header, *rows) = [list(line) for line in lines]
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def footnote(report: dict[str, Any], *notes: str) -> str:
    """What stands below a table: the machine, the versions, what was done, and whether something else ran."""
    host = report["machine"]
    words = [
        f"{host['processor']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB, {host['system']}, "
        f"Python {host['python']}, {report['date']}; "
        + ", ".join(f"{package} {version}" for package, version in report["versions"].items())
        + ".",
        *notes,
    ]
    if (most := max(report["others_percent"])) > QUIET_PERCENT:
        words.append(f"**The machine was not quiet: other programs took up to {most:.0f} % of it. Measure again.**")
    # Outside the table, lines are as short as those of the rest of the README.
    return textwrap.fill(" ".join(words), 120, break_on_hyphens=False, break_long_words=False)


def write(block: str, name: str):
    """Replaces what stands between the marks of this name in the README."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = README.read_text().partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        sys.exit(f"{README.name} lacks the marks {begin} and {end}, between which the table goes; put them back.")
    README.write_text(f"{before}{begin}\n\n{block}\n\n{end}{after}")
