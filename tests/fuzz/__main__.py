"""Damages small valid files at random, and holds what reads them to one rule.

An input is refused in one sentence that names it, or accepted and right: as the reference reads it, where there is
one. `python tests/fuzz --seconds 600` draws new seeds; `--targets gguf --seeds 7 8` runs these alone. The exit code is
1 if one ended in another way: then its target and seed are printed, from which the same input is made again.
"""

import argparse
import collections
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


os.environ |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0", "COLUMNS": "200"}
HERE = Path(__file__).parent

from outcome import outcome_of
from targets import TARGETS


def _preload():
    """Imports what the children need, so that each begins at once; no device is used here."""
    import gguf  # noqa: F401
    import safetensors  # noqa: F401

    import mistral_eqx.cli.answering
    import mistral_eqx.cli.training
    import mistral_eqx.evaluate
    import mistral_eqx.planning
    import mistral_eqx.text  # noqa: F401


def run(target: str, seed: int, bases: Path):
    """Makes and reads the input of one seed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for beside in ("hf",) if target in ("messages", "prompts", "adapter", "adapter-config") else ():
            (folder / beside).symlink_to(bases / beside)
        path = TARGETS[target].place(bases, folder, random.Random(f"{target} {seed}"))
        names = (path.name, *(repr(path.parent.name)[1:-1],), *TARGETS[target].names)
        return outcome_of(lambda: TARGETS[target].read(path), names, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=600, help="how long to draw new seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seeds", nargs="+", type=int, help="these alone, whatever the time")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bases = Path(scratch)
        os.environ["MISTRAL_EQX_CACHE"] = str(bases / "cache")
        subprocess.run([sys.executable, HERE / "bases.py", bases], check=True)
        _preload()
        return _report(chosen, bases)


def _report(chosen: argparse.Namespace, bases: Path) -> int:
    counts: dict[str, collections.Counter[str]] = {target: collections.Counter() for target in chosen.targets}
    end, seed, faults = time.monotonic() + chosen.seconds, chosen.first, 0
    seeds = iter(chosen.seeds) if chosen.seeds else None
    while time.monotonic() < end or seeds is not None:
        if seeds is not None:
            seed = next(seeds, None)
            if seed is None:
                break
        for target in chosen.targets:
            outcome = run(target, seed, bases)
            counts[target][outcome.kind] += 1
            if not outcome.good:
                faults += 1
                print(f"{outcome.kind}: --targets {target} --seeds {seed}: {outcome.said}", flush=True)
            if seeds is None and time.monotonic() > end:
                break
        seed += 1
    for target, kinds in counts.items():
        print(f"{target:18} " + ", ".join(f"{number} {kind}" for kind, number in kinds.most_common()))
    total = sum(sum(kinds.values()) for kinds in counts.values())
    print(f"{total} inputs, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
