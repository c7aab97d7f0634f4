"""How long does it take to read a long prompt, and how much memory, here and with transformers?

The first token after prompts of several lengths, with the weights of the preset `smollm2-135m` in float32 and rounded
to bfloat16. Each length is read in a process of its own, which tells its peak memory.

    python benchmarks/long_prompt.py --json long_prompt.json
    python benchmarks/long_prompt.py --write

The second puts the table into the README beside this file. Run nothing beside it.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import MODEL, TEXT
from rounds import (
    TIMES,
    export,
    footnote,
    in_own_process,
    in_rounds,
    machine,
    peak_bytes,
    table,
    usable_cores,
    versions,
    write,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender is given.

    **Attributes:**

    - `file`: the GGUF file.
    - `folder`: its weights in float32, as transformers reads them.
    - `prompt`: token ids.
    - `repetitions`: how often it is read, in one process.
    """

    file: Path
    folder: Path
    prompt: list[int]
    repetitions: int


def start_mistral_eqx(task: Task, dtype: str) -> Callable[[], int]:
    import mistral_eqx as mx

    model = mx.load(task.file, dtype=dtype)
    return lambda: int(mx.generate(model, [task.prompt], max_new_tokens=1).tokens[0, 0])


def start_transformers(task: Task, dtype: str) -> Callable[[], int]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(usable_cores())
    model = transformers.AutoModelForCausalLM.from_pretrained(task.folder, dtype=getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
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
    seconds = []
    for _ in range(task.repetitions):
        begin = time.perf_counter()
        first()
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": seconds,
        "token": token,
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(),
        "processor_seconds": time.process_time(),
    }


def tell(found: dict[str, Any]) -> str:
    return f"{statistics.median(found['seconds']):6.2f} s, peak {found['peak_bytes'] / 1e9:.2f} GB"


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    lengths, measured = report["lengths"], report["measured"]
    cells = ((f"{length}: first token, s", TIMES, "peak, GB") for length in lengths)
    lines = [["", *(cell for three in cells for cell in three)]]
    medians = {name: statistics.median(s for one in found for s in one["seconds"]) for name, found in measured.items()}
    for contender in report["contenders"]:
        line = [contender]
        for length in lengths:
            found = measured[f"{contender}, {length}"]
            seconds, theirs = medians[f"{contender}, {length}"], medians[f"transformers float32, {length}"]
            peak = max(one["peak_bytes"] for one in found) / 1e9
            line += [f"{seconds:.2f}", f"{seconds / theirs:.2f}", f"{peak:.2f}"]
        lines.append(line)
    how = f"Rounds: {report['rounds']}, repetitions in each: {report['repetitions']}; medians of all."
    return f"{table(lines)}\n\n{footnote(report, how)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8000], help="of the prompts")
    parser.add_argument("--rounds", type=int, default=2, help="how often each contender is started (2)")
    parser.add_argument("--repetitions", type=int, default=2, help="measurements in each round (2)")
    parser.add_argument("--json", type=Path, default=None, help="write all figures to this file")
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    arguments = parser.parse_args()
    # All of them compute on the CPU, compile anew, and look for nothing on a network.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "HF_HUB_OFFLINE": "1"}

    import mistral_eqx as mx
    from mistral_eqx.checkpoint import locate

    file = locate(MODEL)
    ids = mx.load_tokenizer(file).encode(" ".join(TEXT.split()))
    ids *= -(-max(arguments.lengths) // len(ids))
    with tempfile.TemporaryDirectory(prefix="long-prompt-") as temporary:
        folder = Path(temporary) / "float32"
        in_own_process(export, file, folder)
        starts = {
            f"{' '.join(contender)}, {length}": (*contender, Task(file, folder, ids[:length], arguments.repetitions))
            for length in arguments.lengths
            for contender in CONTENDERS
        }
        measured, others = in_rounds(measure, starts, arguments.rounds, tell)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "lengths": arguments.lengths,
        "contenders": [" ".join(contender) for contender in CONTENDERS],
        "rounds": arguments.rounds,
        "repetitions": arguments.repetitions,
        "measured": measured,
        "others_percent": others,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.write:
        write(markdown(report), "long_prompt")
    print(markdown(report))


if __name__ == "__main__":
    main()
