import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from fixtures.cli import assert_refused, run, save_tiny_model

import mistral_eqx as mx


TEXT = "Call me Ishmael. Some years ago\r\nnever mind how long precisely — " * 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    # The cache of compiled programs is a setting of the whole process: other tests are to run without it.
    monkeypatch.setattr("mistral_eqx.cli.loading._keep_compiled_programs", lambda: None)
    monkeypatch.setenv("MISTRAL_EQX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def lines(found):
    return [f"perplexity {found.perplexity:.6g}", f"bits per byte {found.bits_per_byte:.6g}", f"tokens {found.tokens}"]


@pytest.mark.slow
def test_results_are_on_stdout_and_figures_on_stderr(tiny, text):
    options = ("--context", 64, "--stride", 32, "--cache-dtype", "int8")
    result = run("evaluate", "perplexity", "--text", text, "--model", tiny, *options)
    assert result.exit_code == 0, result.stderr
    # The ends of lines are the file's, two bytes each.
    found = mx.perplexity(mx.load(tiny), mx.load_tokenizer(tiny), TEXT, context=64, stride=32, cache_dtype="int8")
    assert found.tokens == found.bytes == len(TEXT.encode())
    assert result.stdout.splitlines() == lines(found)
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(
        r"windows of 64 tokens, one every 32 \| loaded in [\d.]+ s as float32, matmul precision highest \| "
        r"speed [\d.]+ tokens/s, compiling included \| peak memory [\d,]+ MB",
        line,
    )


@pytest.mark.slow
def test_windows_batches_and_devices_are_options(tiny, text):
    arguments = ("evaluate", "perplexity", "--text", text, "--model", tiny)
    whole = mx.perplexity(mx.load(tiny), mx.load_tokenizer(tiny), TEXT)
    options = ("--batch", 3, "--mesh", "tp=2", "--strategy", "heads", "--check")
    result = run(*arguments, *options)
    assert result.exit_code == 0, result.stderr
    figures = [float(line.split()[-1]) for line in result.stdout.splitlines()]
    # What is printed has six digits.
    assert figures == pytest.approx([whole.perplexity, whole.bits_per_byte, whole.tokens], rel=2e-5)
    assert "windows of 256 tokens, one every 128 | " in result.stderr
    assert " | strategy heads on tp=2 | " in result.stderr


def test_ctrl_c_ends_with_what_was_measured(tiny, text, monkeypatch):
    part = mx.Perplexity(-12.0, 6, 8)

    def interrupted(*arguments, progress, **options):
        if part is not None:
            progress(part)
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "perplexity", interrupted)
    result = run("evaluate", "perplexity", "--text", text, "--model", tiny)
    assert result.exit_code == 130
    assert result.stdout.splitlines() == lines(part)
    assert f" | interrupted after 8 of {len(TEXT.encode())} bytes | " in result.stderr
    part = None
    result = run("evaluate", "perplexity", "--text", text, "--model", tiny)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.slow
def test_a_pipe_is_measured_until_ctrl_c(tiny, tmp_path):
    os.mkfifo(path := tmp_path / "pipe")
    command = [sys.executable, "-m", "mistral_eqx", "evaluate", "perplexity", "--text", path, "--model", tiny]
    environment = {**os.environ, "MISTRAL_EQX_CACHE": str(tmp_path / "cache")}
    command = [*map(str, command), "--stride", "256"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as one,
        path.open("w") as pipe,
    ):
        # More than a pipe holds, and a block besides: all is written only when some was measured.
        pipe.write("what is measured " * 12000)
        pipe.flush()
        one.send_signal(signal.SIGINT)
        out, err = one.communicate(timeout=60)
    assert one.returncode == 130, err
    assert re.fullmatch(rb"perplexity [\d.]+\nbits per byte [\d.]+\ntokens \d+\n", out), err
    assert b"interrupted after" in err


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", [], ["The text is empty"]),
        (b"\xff\xfea\x00", [], ["text.txt is not UTF-8 text"]),
        (b"fine " * 40_000 + b"\xff", ["--stride", "256"], ["text.txt is not UTF-8 text"]),
        (None, [], ["text.txt cannot be used: No such file"]),
        (b"text", ["--stride", "0"], ["--stride is 0"]),
        (b"text", ["--stride", "100", "--context", "99"], ["--stride is 100", "context of 99"]),
        (b"text", ["--context", "257"], ["--context is 257", "context of 256"]),
        (b"text", ["--batch", "0"], ["--batch is 0"]),
        (b"text", ["--strategy", "heads", "--mesh", "tp=3"], ["kv_heads", "3"]),
    ],
)
def test_bad_input_is_one_sentence(tiny, tmp_path, monkeypatch, content, options, words):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    if content is None or len(content) < 100:
        monkeypatch.setattr(mx, "load", lambda *args, **options: pytest.fail("the weights were read"))
    else:
        monkeypatch.setattr(mx, "perplexity", lambda model, tokenizer, file, **options: file.read())
    result = run("evaluate", "perplexity", "--text", tmp_path / "text.txt", "--model", tiny, *options)
    assert_refused(result, *words)


def test_a_text_of_one_token(tiny, tmp_path):
    # Without a token for the beginning of a text.
    plain = shutil.copytree(tiny, tmp_path / "plain")
    settings = plain / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"add_bos_token": true', '"add_bos_token": false'))
    (tmp_path / "text.txt").write_text("x")
    result = run("evaluate", "perplexity", "--text", tmp_path / "text.txt", "--model", plain)
    assert_refused(result, "The text has one token")


def test_without_a_measure_there_is_help():
    result = run("evaluate")
    assert result.exit_code == 2
    assert "Usage: mistral-eqx evaluate" in result.stderr
    assert "perplexity" in result.stderr
    assert_refused(run("evaluate", "bogus"), "No such command", "bogus")
    assert_refused(run("evaluate", "perplexity"), "Missing option '--text'")
