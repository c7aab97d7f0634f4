"""The C++ kernels read and write nothing beyond their arrays, whatever bytes a file has.

`FUZZ_SECONDS=1200 pytest -m slow -s tests/test_native_memory.py` tries for longer.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from mistral_eqx.nn.kernels import native


SOURCES = Path(native.__file__).parent
OPTIONS = ["-O1", "-g", "-std=c++17", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = {"avx512": ["-march=x86-64-v4", "-mavx512vnni"], "avx2": ["-mavx2", "-mfma", "-mf16c"], "neon": []}


@pytest.mark.slow
@pytest.mark.skipif(native.instructions() is None, reason="The C++ kernels were not built.")
@pytest.mark.skipif(platform.system() != "Linux" or shutil.which("g++") is None, reason="Needs g++ and its sanitizers.")
def test_random_bytes_stay_in_their_memory(tmp_path):
    program = tmp_path / "fuzz"
    files = [
        str(Path(__file__).parent / "native/fuzz.cc"),
        *(str(SOURCES / f"{name}.cc") for name in ("panels", "attend", "dense")),
    ]
    subprocess.run(
        ["g++", *OPTIONS, *FLAGS[native.instructions()], f"-I{SOURCES}", *files, "-o", str(program)], check=True
    )
    seconds = os.environ.get("FUZZ_SECONDS", "10")
    done = subprocess.run([program, seconds, "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # noqa: T201
    assert int(done.stdout.split()[0]) > 100
