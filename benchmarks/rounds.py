"""What the benchmarks share: contenders in processes of their own, round after round, and a table in the README."""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


# The weights that all contenders have, and the contender to which the others are compared.
MODEL = "smollm2-135m"
REFERENCE = "transformers float32"
# A machine is quiet as long as other programs take no more of its processors than this.
QUIET_PERCENT = 5.0
README = Path(__file__).with_name("README.md")
PROMPT = Path(__file__).with_name("prompt.txt")
TIMES = "\N{MULTIPLICATION SIGN}"

# From a prompt and a number of new tokens to these.
Generate = Callable[[list[int], int], list[int]]


# ---- before the rounds ----


def options(description: str, *, rounds: int = 3, repetitions: int | None = 3) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have.

    **Arguments:**

    - `description`: the script's docstring.
    - `rounds`, `repetitions`: the defaults; `None` for a script that repeats nothing inside a round.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help=f"how often each contender is started ({rounds})"
    )
    if repetitions is not None:
        parser.add_argument(
            "--repetitions", type=positive, default=repetitions, help=f"measurements in each round ({repetitions})"
        )
    parser.add_argument("--json", type=Path, default=None, help="write all figures to this file")
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    parser.add_argument(
        "--no-amx",
        dest="amx",
        action="store_false",
        help="llama.cpp, if it takes part, without AMX instructions, which some virtual machines announce and refuse",
    )
    return parser


def new_tokens_option(parser: argparse.ArgumentParser):
    """Adds the number of tokens after a prompt, from which a rate of decoding is computed."""
    parser.add_argument("--new-tokens", type=_two_or_more, default=64, help="how many tokens to decode (64)")


def positive(text: str) -> int:
    """The type of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _two_or_more(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is too few: the rate is taken over the tokens after the first")
    return number


def find_left_out(needs: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """The contenders of which a module is not installed, and this module; they are also named on the terminal."""
    missing = {
        name: module for name, modules in needs.items() for module in modules if not importlib.util.find_spec(module)
    }
    for name, module in missing.items():
        print(_left_out(name, module), file=sys.stderr)
    return missing


def _left_out(name: str, module: str) -> str:
    return f"Left out: {name}, because {module} is not installed."


def use_cpu():
    """All processes started from here on compute on the CPU, compile anew, and look for nothing on a network."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "HF_HUB_OFFLINE": "1"}


def prompt_ids() -> list[int]:
    """The tokens of the text from which prompts are taken."""
    import mistral_eqx as mx

    return mx.load_tokenizer(MODEL).encode(" ".join(PROMPT.read_text(encoding="utf-8").split()))


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of the preset, as the contenders read them.

    **Attributes:**

    - `file`: the GGUF file, quantized.
    - `folder`: the same weights in float32, in the format of transformers; only its contenders read it.
    """

    file: Path
    folder: Path


@contextlib.contextmanager
def exported_weights() -> Iterator[Weights]:
    """The weights of the preset; the folder exists as long as the context."""
    from mistral_eqx.checkpoint import locate

    file = locate(MODEL)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as temporary:
        folder = Path(temporary) / "float32"
        in_own_process(_export, file, folder)
        yield Weights(file, folder)


def _export(file: Path, folder: Path):
    """Writes the weights for transformers, which needs `accelerate` to read a GGUF file."""
    import mistral_eqx as mx

    mx.save(mx.load(file, dtype="float32"), folder)


# ---- in the process of a contender ----


def load_transformers(folder: Path, dtype: str, **how: Any) -> Any:
    """The model of transformers on all cores, which says nothing while it loads and never stops early."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(usable_cores())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **how)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


def load_llama_cpp(file: Path, context: int, *, amx: bool, **how: Any) -> Any:
    """The model of llama.cpp on all cores, which says nothing while it loads."""
    import llama_cpp
    from llama_cpp import llama_cpp as library

    if not amx:
        # Weights for these instructions are in extra buffers, as are those that it repacks for others.
        defaults = library.llama_model_default_params()
        defaults.use_extra_bufts = False
        library.llama_model_default_params = lambda: defaults
    threads = usable_cores()
    return llama_cpp.Llama(
        str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False, **how
    )


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A prompt and its new tokens, decoded once.

    **Attributes:**

    - `first_seconds`, `whole_seconds`: the time until the first new token, and until the last.
    - `rate`: tokens/s after the first.
    - `tokens`: the new tokens.
    """

    first_seconds: float
    whole_seconds: float
    rate: float
    tokens: list[int]


def decode(generate: Generate, ids: list[int], new_tokens: int) -> Decoding:
    """Decodes one token after a prompt, then all."""
    first, _ = timed(generate, ids, 1)
    whole, tokens = timed(generate, ids, new_tokens)
    if len(tokens) != new_tokens:
        raise RuntimeError(f"{len(tokens)} tokens came where {new_tokens} were asked for.")
    return Decoding(first, whole, (new_tokens - 1) / (whole - first), tokens)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """The seconds that a call takes, and its result."""
    begin = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begin, result


def peak_bytes() -> int:
    """The most memory that this process has had, pages of mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would not do: there a process begins with the peak of the process that started it.
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the rounds ----


def in_rounds(
    measure: Callable[..., dict[str, Any]],
    contenders: dict[str, tuple[Any, ...]],
    rounds: int,
    tell: Callable[[dict[str, Any]], str],
) -> tuple[dict[str, list[dict[str, Any]]], list[float]]:
    """Measures all contenders in each round; each round begins with another one, so that their order changes.

    **Arguments:**

    - `measure`: called in a process of its own.
    - `contenders`: the arguments for each, by name.
    - `tell`: a result in words, for the terminal.

    **Returns:** the results of each contender, with `"peak_bytes"` of its process; and for each measurement how many
    percent of the machine other programs took.
    """
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    names, others = list(contenders), []
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begin, before = time.perf_counter(), _machine_seconds() - time.process_time()
            found = in_own_process(_measured, measure, *contenders[name])
            taken = _machine_seconds() - time.process_time() - before - found["processor_seconds"]
            others.append(100 * taken / ((os.cpu_count() or 1) * (time.perf_counter() - begin)))
            measured[name].append(found)
            print(f"round {number + 1} of {rounds}: {name:28} {tell(found)}", file=sys.stderr)
    return measured, others


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new Python that ends with the call."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _measured(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    return measure(*arguments) | {"peak_bytes": peak_bytes(), "processor_seconds": time.process_time()}


def _machine_seconds() -> float:
    """The processor time that all programs of this machine together have used, or that its host took away."""
    import psutil

    times = psutil.cpu_times()._asdict()
    # Linux counts the time of guests as time of their hosts too.
    return sum(times.values()) - sum(times.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))


# ---- after the rounds ----


def make_report(
    arguments: argparse.Namespace, measured: dict[str, list[dict[str, Any]]], others: list[float], **more: Any
) -> dict[str, Any]:
    """All that was measured, the options, the machine and the versions."""
    outputs = ("json", "write", "markdown", "folder")
    chosen = {name: value for name, value in vars(arguments).items() if name not in outputs}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": _versions(),
        **chosen,
        **more,
        "measured": measured,
        "others_percent": others,
    }


def keep(report: dict[str, Any], block: str, name: str, arguments: argparse.Namespace):
    """Writes the figures to a file and the table into the section of this name, as the options ask for."""
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.write:
        write(block, name)


def pooled(found: list[dict[str, Any]], figure: str) -> list[float]:
    """All repetitions of all rounds."""
    return [value for one in found for value in one[figure]]


def spread(values: list[float], digits: int) -> str:
    """The median, with the least and the most."""
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def peak_gb(found: list[dict[str, Any]]) -> str:
    """The largest peak of all rounds."""
    return f"{max(one['peak_bytes'] for one in found) / 1e9:.2f}"


def how_often(report: dict[str, Any]) -> str:
    """How often a contender was measured, as a clause."""
    return (
        f"rounds: {report['rounds']}, repetitions in each: {report['repetitions']}; medians of all, with the least "
        "and the most."
    )


def equal_tokens(mine: list[int], theirs: list[int]) -> int:
    """How many tokens are equal before the first that differs."""
    pairs = enumerate(zip(mine, theirs, strict=True))
    return next((at for at, (one, other) in pairs if one != other), len(mine))


def llama_cpp_notes(report: dict[str, Any]) -> list[str]:
    """For the footnote: without which instructions llama.cpp ran, and who is left out."""
    notes = [] if report["amx"] else ["llama.cpp without AMX instructions, and without repacked weights."]
    return [*notes, *(_left_out(name, module) for name, module in report["left_out"].items())]


def table(lines: Iterable[Iterable[str]]) -> str:
    """Markdown: the first line is the header, and of each line the first cell stands on the left."""
    (header, *rows) = [list(line) for line in lines]
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def footnote(report: dict[str, Any], *notes: str) -> str:
    """The paragraph below a table: the machine, the versions, what was done, and whether the machine was quiet."""
    host = report["machine"]
    words = [
        f"{host['processor']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB, {host['system']}, "
        f"Python {host['python']}, {report['date']}; "
        + ", ".join(f"{package} {version}" for package, version in report["versions"].items())
        + ".",
        *notes,
    ]
    if warning := not_quiet(report):
        words.append(f"**{warning}**")
    # Outside the table, lines are as short as those of the rest of the README.
    return textwrap.fill(" ".join(words), 120, break_on_hyphens=False, break_long_words=False)


def not_quiet(report: dict[str, Any]) -> str:
    """A warning if other programs took more than a little of the machine, else nothing."""
    if (most := max(report["others_percent"])) <= QUIET_PERCENT:
        return ""
    return f"The machine was not quiet: other programs took up to {most:.0f} % of it. Measure again."


def write(block: str, name: str, page: Path | None = None):
    """Replaces what stands between the marks of this name in a page, the README unless another is given."""
    page = page or README
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        sys.exit(f"{page.name} lacks the marks {begin} and {end}, between which the table goes; put them back.")
    page.write_text(f"{before}{begin}\n\n{block}\n\n{end}{after}", encoding="utf-8")


def _machine() -> dict[str, Any]:
    import psutil

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return {
        "processor": name,
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in ("mistral-eqx", "jax", "equinox", "torch", "transformers", "llama-cpp-python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
