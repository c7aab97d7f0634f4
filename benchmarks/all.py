"""Runs the benchmarks of the CPU one after the other, and writes all their tables into the README.

    python benchmarks/all.py

All tables are then of one day and one machine. It takes about three hours, on a machine that runs nothing else.
`--rounds 1` gives a first look. Options are given to all scripts.
"""

import subprocess
import sys
from pathlib import Path


SCRIPTS = (
    *("peers", "packed", "bandwidth", "first_token", "experts", "batch", "long_prompt", "perplexity", "beam", "train"),
    *("speculation", "quantization"),
)


def main():
    failed = []
    for name in SCRIPTS:
        print(f"==> {name}.py", flush=True)
        script = Path(__file__).with_name(f"{name}.py")
        if subprocess.run([sys.executable, script, "--write", *sys.argv[1:]], check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"These did not finish: {', '.join(failed)}; run them alone to see why.")


if __name__ == "__main__":
    main()
