"""Builds the C++ kernels when the package is built, if a compiler is there; the package works without them."""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


FOLDER = Path("mistral_eqx/nn/kernels/native")
OPTIONS = ["-O3", "-std=c++17", "-fPIC", "-Wno-psabi"]
# The library brings its C++ runtime along, and shows none of it.
STATIC = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
# The products are compiled for each instruction set; which one is used is decided when the library runs.
SETS = {
    "x86_64": {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": ["-march=x86-64-v4", "-mavx512vnni"]},
    "aarch64": {"neon": ["-march=armv8.2-a+dotprod+fp16"]},
}
SETS |= {"AMD64": SETS["x86_64"], "arm64": SETS["aarch64"]}


class Kernels(BuildHookInterface):
    """The hook of hatchling."""

    def initialize(self, version: str, build_data: dict):
        """Compiles the library into the package; a failure is reported and leaves it out."""
        library = Path(self.root) / FOLDER / "_kernels.so"
        chosen = os.environ.get("CXX")
        if os.environ.get("MISTRAL_EQX_KERNELS", "").lower() == "off":
            library.unlink(missing_ok=True)
            return
        if chosen or not _is_newest(library):
            library.unlink(missing_ok=True)
            self._compile(library, chosen or next(filter(shutil.which, ("c++", "g++", "clang++")), None))
        if library.exists():
            build_data["artifacts"].append(str(FOLDER / library.name))
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _compile(self, library: Path, compiler: str | None):
        sets = SETS.get(platform.machine())
        if compiler is None or sets is None:
            self.app.display_warning("Without the C++ kernels, because there is no compiler or no kernel for this CPU.")
            return
        try:
            _build(shlex.split(compiler), sets, library)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or ""
            self.app.display_warning(f"Without the C++ kernels, because they could not be compiled: {error}\n{said}")


def _is_newest(library: Path) -> bool:
    """Whether the library is newer than all that it is made of."""
    sources = [Path(__file__), *library.parent.glob("*.cc"), *library.parent.glob("*.h")]
    return library.exists() and library.stat().st_mtime > max(source.stat().st_mtime for source in sources)


def _build(compiler: list[str], sets: dict[str, list[str]], library: Path):
    import jaxlib

    include = Path(jaxlib.__file__).with_name("include")
    sources = library.parent
    with tempfile.TemporaryDirectory() as temporary:
        commands, objects = [], []

        def compiled(source: str, name: str, *flags: str):
            objects.append(str(Path(temporary) / f"{name}.o"))
            commands.append([*compiler, *OPTIONS, *flags, "-c", str(sources / source), "-o", objects[-1]])

        for name, flags in sets.items():
            for kernel in ("panels", "attend", "dense"):
                compiled(f"{kernel}.cc", f"{kernel}-{name}", *flags)
        compiled("calls.cc", "calls", "-isystem", str(include))
        compiled("arrange.cc", "arrange")
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
        for command, process in zip(commands, running, strict=True):
            _, said = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=said)
        linked = Path(temporary) / library.name
        link = [
            *compiler,
            "-shared",
            *([] if platform.system() == "Darwin" else STATIC),
            "-s",
            "-o",
            str(linked),
            *objects,
        ]
        subprocess.run(link, check=True, capture_output=True, text=True)
        shutil.copyfile(linked, library)
