"""The C++ kernels read and write nothing beyond their arrays, whatever bytes a file has and whatever shapes a call has.

`FUZZ_SECONDS=1200 pytest -m slow -s tests/test_native_memory.py` tries for longer.
"""

import functools
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jaxlib
import pytest

from mistral_eqx.nn.kernels import native


SOURCES = Path(native.__file__).parent
OPTIONS = ["-O1", "-g", "-std=c++17", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
X86 = {"avx512": ["-march=x86-64-v4", "-mavx512vnni"], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
SETS = {"avx512": X86, "avx2": X86, "neon": {"neon": []}}


def build(folder: Path, own: str) -> Path:
    """The program, with the kernels for all instructions of this platform; `own` are those of this processor."""
    tests, sets = Path(__file__).parent / "native", SETS[own]
    headers = Path(jaxlib.__file__).with_name("include")
    files = [(SOURCES / f"{kernel}.cc", name) for kernel in ("panels", "attend", "dense") for name in sets]
    files += [(SOURCES / "calls.cc", None), (tests / "fuzz_calls.cc", None), (tests / "fuzz.cc", own)]
    objects, commands = [], []
    for file, name in files:
        objects.append(folder / f"{file.stem}-{name}.o")
        flags = [] if name is None else sets[name]
        # The program is linked with the other sets of instructions and never runs them.
        options = OPTIONS if name in (None, own) else ["-O0", "-std=c++17", "-Wno-psabi"]
        commands.append(["g++", *options, *flags, f"-I{SOURCES}", "-isystem", headers, "-c", file, "-o", objects[-1]])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(functools.partial(subprocess.run, check=True), commands))
    subprocess.run(["g++", *OPTIONS, *objects, "-o", folder / "fuzz"], check=True)
    return folder / "fuzz"


@pytest.mark.long
@pytest.mark.skipif(native.instructions() is None, reason="The C++ kernels were not built.")
@pytest.mark.skipif(platform.system() != "Linux" or shutil.which("g++") is None, reason="Needs g++ and its sanitizers.")
def test_random_bytes_stay_in_their_memory(tmp_path):
    program = build(tmp_path, native.instructions())
    seconds = os.environ.get("FUZZ_SECONDS", "10")
    done = subprocess.run([program, seconds, "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # noqa: T201
    assert int(done.stdout.split()[0]) > 100
