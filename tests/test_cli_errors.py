import importlib.util
import io
import os
import runpy
import subprocess
import sys

import jax
import pytest
from fixtures.cli import assert_refused, run, save_tiny_model
from rich.console import Console

import mistral_eqx as mx
from mistral_eqx.cli import progress
from mistral_eqx.cli.devices import Devices
from mistral_eqx.cli.errors import _with_options
from mistral_eqx.cli.options import ProcessOptions
from mistral_eqx.errors import InputError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


FLOATS = ["temperature", "top-p", "min-p", "typical-p"]
FLOATS += ["repetition-penalty", "presence-penalty", "frequency-penalty", "length-penalty"]
COUNTS = ["max-new-tokens", "min-new-tokens", "num-samples", "num-beams", "logprobs", "top-k", "seed"]
COUNTS += ["prefill-chunk", "batch-size"]
COUNTS += ["num-processes", "process-id"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, value) for name in FLOATS for value in ("nan", "inf", "-inf", "1e400", "abc", "")),
        *((name, value) for name in COUNTS for value in ("-1", str(2**63), "9" * 30, "1.5", "nan", "abc", "")),
    ],
)
def test_a_number_that_an_option_cannot_have_is_refused_by_its_name(option, value):
    assert_refused(run("generate", "hi", "--model", "absent", f"--{option}={value}"), f"--{option}")


@pytest.mark.parametrize("value", ["0", "-1", str(2**63), "nan"])
@pytest.mark.parametrize(
    ("command", "options"),
    [
        (("chat",), ["--max-new-tokens", "--top-k"]),
        (("evaluate", "perplexity", "--text", "x"), ["--context", "--stride", "--batch"]),
        (
            ("plan", "gpt-nano"),
            ["--devices", "--batch", "--prompt", "--kv-seq", "--seq", "--accumulate"],
        ),
    ],
)
def test_the_counts_of_other_commands_too(command, options, value):
    for option in options:
        assert_refused(run(*command, f"{option}={value}"), option)


@pytest.mark.parametrize(
    ("message", "key", "file", "said"),
    [
        ("top_k is 0; it must be at least 1.", "top_k", None, "--top-k is 0; it must be at least 1."),
        ("max_new_tokens, of 'max_new_tokens'", None, None, "--max-new-tokens, of 'max_new_tokens'"),
        ("/x/top_k.json and top_k/y are bad (top_k)", None, None, "/x/top_k.json and top_k/y are bad (--top-k)"),
        ("stop is 5", "stop", None, "--stop is 5"),
        ("stop is 5", "stop", "config.json", "stop is 5"),
        ("it must stop", None, None, "it must stop"),
        ("allow it (overwrite)", None, None, "allow it (--overwrite)"),
        ("leave it out (tokenizer=False).", None, None, "leave it out (--no-tokenizer)."),
        ("set eos_id=None or no_such", None, None, "set eos_id=None or no_such"),
    ],
)
def test_an_argument_is_an_option_where_the_command_has_it(message, key, file, said):
    options = {"top_k": "--top-k", "max_new_tokens": "--max-new-tokens", "stop": "--stop", "overwrite": "--overwrite"}
    options["no_tokenizer"] = "--no-tokenizer"
    assert _with_options(InputError(message, key=key, file=file), options) == said


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyError("embed"), 70, ["a fault of mistral-eqx", "KeyError at cli/", "embed", "--debug"]),
        (ValueError("odd"), 70, ["a fault of mistral-eqx", "ValueError", "odd"]),
        (RecursionError("deep"), 70, ["RecursionError"]),
        (BaseException("a panic"), 70, ["a panic"]),
        (MemoryError(), 2, ["not enough memory"]),
        (OSError(28, "No space left on device", "a/b"), 2, ["Error: a/b cannot be used: No space left on device."]),
        (OSError(28, "No space left on device"), 2, ["stdout, or a file"]),
        (FileNotFoundError(2, "No such file", ""), 2, ["Error: '' cannot be used"]),
        (OSError(36, "File name too long", "a" * 5000), 2, ["'aaa", "...", "File name too long"]),
        (InputError("the file 'a\x1b[2J\n' is bad"), 2, ["\\x1b[2J"]),
    ],
)
def test_what_leaves_a_command_is_one_line(tiny, monkeypatch, error, code, words):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("mistral_eqx.cli.loading.locate", fail)
    result = run("generate", "hi", "--model", tiny)
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert line.isprintable()
    assert len(line) < 2100
    for word in words:
        assert word in line


@pytest.mark.parametrize("bad", ["a\0b", "a\udcffb"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "{}"),
        ("generate", "hi", "--model", "{}"),
        ("generate", "--prompts", "{}"),
        ("generate", "--prompts", "x", "--output", "{}"),
        ("chat", "--system", "{}"),
        ("inspect", "{}"),
        ("convert", "x", "{}"),
        ("plan", "{}", "--devices", "1"),
        ("evaluate", "perplexity", "--text", "{}"),
        ("train", "{}"),
    ],
)
def test_what_no_path_and_no_text_can_have_is_refused(arguments, bad):
    result = run(*(argument.format(bad) for argument in arguments))
    assert_refused(result, "The argument 'a\\", "null byte" if "\0" in bad else "not UTF-8")


@pytest.mark.parametrize(
    "arguments", [("inspect", "{}"), ("plan", "{}"), ("convert", "{}", "x"), ("convert", "x", "{}")]
)
def test_a_user_that_there_is_not(arguments):
    result = run(*(argument.format("~no-such-user/x") for argument in arguments))
    assert_refused(result, "'~no-such-user/x'", "there is no user")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("JAX_NUM_CPU_DEVICES", "x", ["JAX_NUM_CPU_DEVICES"]),
        ("JAX_ENABLE_X64", "perhaps", ["JAX_ENABLE_X64"]),
        ("JAX_PLATFORMS", "nope", ["JAX_PLATFORMS", "'nope'"]),
        ("XLA_FLAGS", "--nope", ["XLA_FLAGS='--nope'"]),
        ("MISTRAL_EQX_CACHE", "~no-such-user/x", ["MISTRAL_EQX_CACHE", "~no-such-user"]),
    ],
)
@pytest.mark.slow
def test_a_variable_that_jax_or_xla_would_end_for_is_named(tiny, name, value, words):
    done = subprocess.run(
        [sys.executable, "-m", "mistral_eqx", "generate", "hi", "-n", "1", "--model", str(tiny)],
        env={**os.environ, name: value},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(("modules", "expected"), [(["libtpu"], "cpu"), (["libtpu", "jax_plugins"], None), ([], None)])
def test_libtpu_is_not_asked_where_there_is_no_tpu(tmp_path, monkeypatch, modules, expected):
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    find = importlib.util.find_spec
    known = ("libtpu", "jax_plugins")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name in modules or None if name in known else find(name)
    )
    monkeypatch.delenv("JAX_PLATFORMS")
    runpy.run_path(mx.__path__[0] + "/environment.py")
    assert os.environ.pop("JAX_PLATFORMS", None) == expected


def test_a_mesh_is_held_to_the_model_before_its_devices_are_made(tiny, monkeypatch):
    config = mx.PRESETS["gpt-nano"]
    monkeypatch.setattr("mistral_eqx.cli.devices._are_known", lambda: False)
    monkeypatch.setattr(type(jax.config), "update", lambda *arguments: pytest.fail("devices were made"))
    with pytest.raises(InputError, match="3 kv_heads cannot be split over 64 devices"):
        Devices(ProcessOptions("tp=64")).place(config)
    with pytest.raises(InputError, match="takes 8192 devices"):
        Devices(ProcessOptions("dp=8192", "batch@dp")).place(config)
    for mesh in ("tp=99999", "tp=" + "9" * 30):
        with pytest.raises(InputError, match=r"the mesh's axis|The mesh .* devices"):
            Devices(ProcessOptions(mesh))


def test_a_bar_shows_a_name_as_it_is(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **options: Console(file=out, force_terminal=True, width=200))
    with progress.progress_bar("Fetching [/nope] [bold]x") as report:
        report(1, 2)
    assert "Fetching [/nope] [bold]x" in out.getvalue()
