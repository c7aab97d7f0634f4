"""`mistral-eqx generate` with many prompts, many texts a prompt, and files of prompts."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.cli import assert_refused, run, save_tiny_model
from fixtures.multi_host import environment, free_port

import mistral_eqx as mx
from mistral_eqx.cli.continuing import Chosen, Continuation, Likely
from mistral_eqx.cli.prompts import Prompt, in_batches, read_file
from mistral_eqx.cli.texts import json_lines
from mistral_eqx.locks import try_lock


PROMPTS = ["Call me", "Call", "Some years ago"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    # The cache of compiled programs is a setting of the whole process: other tests are to run without it.
    monkeypatch.setattr("mistral_eqx.cli.loading._keep_compiled_programs", lambda: None)
    monkeypatch.setenv("MISTRAL_EQX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path):
    """A file of prompts, of both kinds of lines, with a line of nothing and a key of the user's own."""
    path = tmp_path / "prompts.jsonl"
    lines = [
        json.dumps({"id": 7, "prompt": PROMPTS[0]}),
        json.dumps(PROMPTS[1]),
        "",
        json.dumps({"prompt": PROMPTS[2]}),
    ]
    path.write_text("\n".join(lines))
    return path


def library(model, prompts=PROMPTS, **options):
    """What the library says of the prompts, of which each draws by its number."""
    tokenizer = mx.load_tokenizer(model)
    keys = jax.vmap(jr.fold_in, in_axes=(None, 0))(jr.key(0), jnp.arange(len(prompts)))
    ids = [tokenizer.encode(text) for text in prompts]
    return mx.generate(mx.load(model), ids, key=keys, tokenizer=tokenizer, **{"eos_id": (), **options})


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_several_prompts_stand_under_headings(tiny):
    texts = library(tiny, max_new_tokens=9).texts
    result = run("generate", *PROMPTS, "--model", tiny, "-n", 9, "--ignore-eos")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "\n".join(
        f"==> {prompt} <==\n{text}\n" for prompt, text in zip(PROMPTS, texts, strict=True)
    )
    assert result.stderr.startswith("prompts 3 of 28 tokens | loaded in ")
    assert " | texts 3 of 27 tokens in " in result.stderr


@pytest.mark.slow
def test_a_batch_says_what_each_prompt_says_alone_and_in_any_other_batch(tiny, file):
    """Also what it draws; a last batch that is filled up is one of them."""
    options = ("--model", tiny, "-n", 9, "--temperature", 2, "--ignore-eos", "--prompts", file, "--batch-size")
    texts = library(tiny, max_new_tokens=9, sampler=mx.Sampler(temperature=2.0)).texts
    for size in (2, 8):
        result = run("generate", *options, size)
        assert [line["text"] for line in lines(result.stdout)] == texts, result.stderr


@pytest.mark.slow
def test_lines_carry_what_stood_on_the_prompts(tiny, file, tmp_path):
    out = library(tiny, max_new_tokens=30, eos_id=1)
    expected = [
        {"prompt": prompt, "text": text, "tokens": int(length), "finish": "length" if length == 30 else "stop"}
        for prompt, text, length in zip(PROMPTS, out.texts, out.lengths, strict=True)
    ]
    expected[0]["id"] = 7
    options = ("generate", "--model", tiny, "-n", 30, "--prompts")
    assert lines(run(*options, file).stdout) == expected
    assert lines(run(*options, "-", input=file.read_text()).stdout) == expected
    written = run(*options, file, "--output", tmp_path / "out.jsonl")
    assert (written.exit_code, written.stdout) == (0, "")
    assert lines((tmp_path / "out.jsonl").read_text("utf-8")) == expected
    # A file of texts is one of prompts too, and may be replaced by what is made of it.
    again = run(*options, tmp_path / "out.jsonl", "--output", tmp_path / "out.jsonl", "--overwrite")
    assert again.exit_code == 0, again.stderr
    assert lines((tmp_path / "out.jsonl").read_text("utf-8")) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


@pytest.mark.slow
def test_stop_strings_end_texts(tiny, file):
    whole = library(tiny, max_new_tokens=20).texts
    stop = next(character for character in whole[0][3:] if character.isascii())
    out = library(tiny, max_new_tokens=20, stop=[stop, "absent"])
    options = ("--model", tiny, "-n", 20, "--ignore-eos", "--stop", stop, "--stop", "absent")
    found = lines(run("generate", *options, "--prompts", file).stdout)
    assert [line["text"] for line in found] == out.texts
    assert [line["tokens"] for line in found] == out.lengths.tolist()
    assert [line["finish"] for line in found] == ["stop" if stop in text else "length" for text in whole]
    assert run("generate", PROMPTS[0], *options).stdout == out.texts[0] + "\n"


@pytest.mark.slow
def test_samples_are_drawn_and_a_list(tiny, file):
    out = library(tiny, max_new_tokens=6, num_samples=2, sampler=mx.Sampler(temperature=3.0))
    options = ("--model", tiny, "-n", 6, "--ignore-eos", "--temperature", 3, "--num-samples", 2)
    found = lines(run("generate", *options, "--prompts", file).stdout)
    assert [[one["text"] for one in line["samples"]] for line in found] == [out.texts[at : at + 2] for at in (0, 2, 4)]
    result = run("generate", PROMPTS[0], *options)
    assert result.stdout == (
        f"==> {PROMPTS[0]} (1 of 2) <==\n{out.texts[0]}\n\n==> {PROMPTS[0]} (2 of 2) <==\n{out.texts[1]}\n"
    )


@pytest.mark.slow
def test_log_probabilities_are_the_models(tiny, file):
    out = library(tiny, max_new_tokens=5, logprobs=2)
    options = ("--model", tiny, "-n", 5, "--ignore-eos", "--logprobs")
    found = lines(run("generate", *options, 2, "--prompts", file).stdout)
    assert [[token["id"] for token in line["logprobs"]] for line in found] == out.tokens.tolist()
    # They are written in as many digits as a float32 needs.
    assert (np.float32([[token["logprob"] for token in line["logprobs"]] for line in found]) == out.log_probs).all()
    top = [[[one["id"] for one in token["top"]] for token in line["logprobs"]] for line in found]
    assert top == out.top_tokens.tolist()
    names = [token["token"] for token in found[0]["logprobs"]]
    assert all(name == mx.load_tokenizer(tiny).decode([id]) for name, id in zip(names, out.tokens[0], strict=True))
    blocks = run("generate", *PROMPTS, *options, 2).stdout.split("==> ")[1:]
    for prompt, text, line, block in zip(PROMPTS, out.texts, found, blocks, strict=True):
        rows = [
            "\t".join(
                f"{json.dumps(one['token'], ensure_ascii=False)} {one['logprob']:.4f}" for one in (token, *token["top"])
            )
            for token in line["logprobs"]
        ]
        assert block.rstrip("\n") == "\n".join([f"{prompt} <==", text, "", *rows])


@pytest.mark.slow
def test_beams_are_those_of_a_beam_search(tiny):
    tokenizer = mx.load_tokenizer(tiny)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "length_penalty": 0.5, "eos_id": 1}
    best = mx.beam_search(mx.load(tiny), [tokenizer.encode("Call me")], **options)
    texts = [tokenizer.decode(best.tokens[0, at, : best.lengths[0, at]]) for at in range(2)]
    beams = ("--model", tiny, "--num-beams", 3, "--length-penalty", 0.5, "-n", 8)
    (line,) = lines(run("generate", *beams, "--num-samples", 2, "--prompts", "-", input='"Call me"').stdout)
    assert [text["text"] for text in line["samples"]] == texts
    assert [text["tokens"] for text in line["samples"]] == best.lengths[0].tolist()
    ended = [best.tokens[0, at, best.lengths[0, at] - 1] == 1 for at in range(2)]
    assert [text["finish"] for text in line["samples"]] == ["stop" if end else "length" for end in ended]
    assert (np.float32([text["score"] for text in line["samples"]]) == best.scores[0]).all()
    alone = run("generate", "Call me", *beams)
    assert alone.stdout == texts[0] + "\n"
    assert f" | score {best.scores[0, 0]:.4f} | " in alone.stderr
    several = run("generate", "Call me", *beams, "--num-samples", 2)
    assert several.stdout == "\n".join(
        f"==> Call me ({at + 1} of 2, score {best.scores[0, at]:.4f}) <==\n{texts[at]}\n" for at in range(2)
    )


@pytest.mark.slow
def test_all_sampling_options_reach_the_sampler(tiny):
    processors = [mx.RepetitionPenalty(1.3), mx.PresencePenalty(0.5), mx.FrequencyPenalty(0.2), mx.MinNewTokens(20)]
    sampler = mx.Sampler(temperature=4.0, min_p=0.01, typical_p=0.9, processors=processors)
    out = library(tiny, PROMPTS[:1], max_new_tokens=20, sampler=sampler, eos_id=1)
    options = ("--temperature", 4, "--min-p", 0.01, "--typical-p", 0.9, "--repetition-penalty", 1.3)
    options = (*options, "--presence-penalty", 0.5, "--frequency-penalty", 0.2, "--min-new-tokens", 20)
    result = run("generate", PROMPTS[0], "--model", tiny, "-n", 20, *options, "--prefill-chunk", 8)
    assert result.stdout == out.texts[0] + "\n"


@pytest.mark.slow
def test_the_cache_can_be_quantized(tiny):
    tokenizer, model = mx.load_tokenizer(tiny), mx.load(tiny)
    ids, options = [tokenizer.encode("Call me")], ("--model", tiny, "--cache-dtype", "int8", "-n", 8)
    out = mx.generate(model, ids, max_new_tokens=8, logprobs=0, eos_id=1, cache_dtype="int8")
    (line,) = lines(run("generate", *options, "--logprobs", 0, "--prompts", "-", input='"Call me"').stdout)
    found = [token["logprob"] for token in line["logprobs"]]
    assert (np.float32(found) == out.log_probs[0, : len(found)]).all()
    best = mx.beam_search(model, ids, num_beams=2, max_new_tokens=8, eos_id=1, cache_dtype="int8")
    (line,) = lines(run("generate", *options, "--num-beams", 2, "--prompts", "-", input='"Call me"').stdout)
    assert np.float32(line["score"]) == best.scores[0, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cache-dtype", "int4"), ["int4", "int8", "float8_e4m3"]),
        (("--num-beams", 2, "--temperature", 1), ["--temperature does not combine with --num-beams"]),
        (("--num-beams", 2, "--presence-penalty", 1), ["--presence-penalty does not combine with --num-beams"]),
        (("--num-beams", 2, "--min-new-tokens", 1), ["--min-new-tokens does not combine with --num-beams"]),
        (("--num-beams", 2, "--stop", "x"), ["--stop does not combine with --num-beams"]),
        (("--num-beams", 2, "--logprobs", 0), ["--logprobs does not combine with --num-beams"]),
        (("--num-beams", 2, "--num-samples", 3), ["--num-samples is 3, more than the 2 of --num-beams"]),
        (("--num-beams", 261), ["--num-beams is 261, more than the 260 tokens"]),
        (("--num-beams", 2, "--length-penalty", "nan"), ["--length-penalty is nan"]),
        (("--num-beams", 0), ["--num-beams"]),
        (("--length-penalty", 1), ["--length-penalty", "add --num-beams"]),
        (("--num-samples", 2), ["--num-samples is 2", "add --temperature"]),
        (("--num-samples", 2, "--temperature", 0), ["--num-samples is 2", "add --temperature"]),
        (("--logprobs", 261), ["--logprobs is 261, more than the 260 tokens"]),
        (("--stop", ""), ["The stop string ''"]),
        (("--min-p", 2), ["--min-p is 2.0"]),
        (("--typical-p", 0), ["--typical-p is 0.0"]),
        (("--repetition-penalty", 0), ["--repetition-penalty is 0.0"]),
        (("--frequency-penalty", 3), ["--frequency-penalty is 3.0"]),
        (("--min-new-tokens", 65), ["--min-new-tokens is 65", "--max-new-tokens"]),
        (("--min-new-tokens", 1, "--ignore-eos"), ["--min-new-tokens", "--ignore-eos"]),
        (("--output", "x.jsonl"), ["--output is for the texts of --prompts"]),
        (("--overwrite",), ["--overwrite replaces the file of --output"]),
        (("--prompts", "x.jsonl"), ["There are prompts as arguments and a file of --prompts"]),
        (("",), ["Prompt 2 is empty"]),
        (("x" * 300,), ["Prompt 2: A prompt of 301 tokens and 64 new ones", "context of 256 tokens"]),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_the_weights_are_read(tiny, options, words, monkeypatch):
    monkeypatch.setattr(mx, "load", lambda *args, **options: pytest.fail("the weights were read"))
    assert_refused(run("generate", "hi", "--model", tiny, *options), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["There is no prompt in"]),
        (b"\n \n", ["There is no prompt in"]),
        (b'"a"\n\n{"prompt": "b"\n', ["Line 3 of", "is not valid JSON"]),
        (b'"a"\n\xff\xfe"\n', ["Line 2 of", "is not valid JSON"]),
        (b"[" * 100_000, ["Line 1 of", "is not valid JSON"]),
        (b'{"text": "b"}\n', ["Line 1 of", 'has no "prompt"']),
        (b'["b"]\n', ["Line 1 of", 'has no "prompt"']),
        (b'{"prompt": 3}\n', ["Line 1 of", "is no string"]),
        (b'"a"\n{"prompt": ""}\n', ["Line 2 of", "an empty prompt"]),
        (b'"a"\n"' + 300 * b"x" + b'"\n', ["Line 2 of", "A prompt of 301 tokens", "context of 256 tokens"]),
        (b'"\\ud800"\n', ["Line 1 of", "half of a character"]),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n', ["Line 1 of", "half of a character"]),
        (b'{"messages": "hi"}\n', ["Line 1 of", "list of objects"]),
        (b'{"messages": []}\n', ["Line 1 of", "conversation is empty"]),
        (b'{"messages": [5]}\n', ["Line 1 of", "[5]", "list of objects"]),
        (b'{"messages": [], "prompt": "a"}\n', ["Line 1 of", "keep one of the two"]),
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_a_bad_line_is_named(tiny, tmp_path, content, words, piped, monkeypatch):
    monkeypatch.setattr(mx, "load", lambda *args, **options: pytest.fail("the weights were read"))
    (tmp_path / "prompts.jsonl").write_bytes(content)
    options = ("generate", "--model", tiny, "--output", tmp_path / "out.jsonl", "--prompts")
    result = run(*options, "-", input=content) if piped else run(*options, tmp_path / "prompts.jsonl")
    assert_refused(result, *words)
    assert not list(tmp_path.glob("out*"))


def test_a_line_with_an_image_is_refused_with_its_number(tiny, tmp_path):
    path = tmp_path / "prompts.jsonl"
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    path.write_text('"Hi"\n' + json.dumps({"messages": messages}))
    result = run("generate", "--model", tiny, "--prompts", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Line 2" in result.stderr
    assert "has the part 'image_url', but only text models are supported" in result.stderr


def test_files_that_cannot_be_used_are_refused(tiny, file, tmp_path):
    options = ("generate", "--model", tiny, "--prompts")
    assert_refused(run(*options, tmp_path / "absent"), f"{tmp_path / 'absent'} cannot be used: No such file")
    assert_refused(run(*options, tmp_path), "is a folder; give a file of prompts")
    options = (*options, file, "--output")
    assert_refused(run(*options, tmp_path / "absent" / "out"), "The folder of", "is not there")
    assert_refused(run(*options, tmp_path, "--overwrite"), "is no file that could be replaced")
    assert_refused(run(*options, file), "is there already", "--overwrite")
    (tmp_path / "out.partial").write_text("from before")
    assert_refused(run(*options, tmp_path / "out"), "out.partial' is there already")


def test_values_of_a_line_stay_as_they_stood(tiny, tmp_path):
    kept = '"id": 12345678901234567890123, "x": 0.1000000000000000055, "y": [1.50, {"z": 1E5}], "s": "\\ud800"'
    kept += ', "text": 1'
    content = "\ufeff{" + kept + ', "prompt": "Call"}\r"Call me"\r\n\n'
    (tmp_path / "p.jsonl").write_bytes(content.encode())
    result = run("generate", "--model", tiny, "-n", 2, "--prompts", tmp_path / "p.jsonl")
    assert result.exit_code == 0, result.stderr
    first, second = result.stdout.splitlines()
    text = json.dumps(json.loads(first)["text"], ensure_ascii=False)
    assert first.startswith("{" + kept.replace('"text": 1', f'"text": {text}') + ', "prompt": "Call", "tokens": 2')
    assert json.loads(second)["prompt"] == "Call me"


def test_a_probability_of_zero_is_null_in_json():
    text = Continuation("b", 1, "length", logprobs=[Chosen(6, "b", -0.5, [Likely(5, "a", -math.inf)])])
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out), json_lines(None, overwrite=False, several=False) as write:
        write(Prompt(0, "a", [5], {"prompt": '"a"'}), [text])
    (token,) = json.loads(out.buffer.getvalue(), parse_constant=pytest.fail)["logprobs"]
    assert token["top"] == [{"id": 5, "token": "a", "logprob": None}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a", "id": NaN}', ["NaN"]),
        (b'{"prompt": "a", "id": 1e400}', ["1e400"]),
        (b'{"prompt": "a", "prompt": "b"}', ["twice"]),
        (b'{"prompt": "a", "x": ' + b"[" * 100 + b"]" * 100 + b"}", ["nests deeper"]),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["nests deeper"]),
        (b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}", ["4300"]),
        (b'{"prompt": "a"}{"prompt": "b"}', ["Extra data"]),
        ('"a"'.encode("utf-16"), ["UTF-8"]),
        (b'{"prompt": "\\ud83d"}', ["half of a character"]),
        (b'"' + b"a" * (16 * 2**20) + b'"', ["16 MB"]),
        (b'"' + b"a" * 300_000 + b'"', ["300,000 characters", "context of 256"]),
    ],
)
def test_what_is_no_json_or_too_much_is_refused_with_its_line(tiny, tmp_path, content, words):
    (tmp_path / "p.jsonl").write_bytes(b'"fine"\n' + content + b"\n")
    assert_refused(run("generate", "--model", tiny, "--prompts", tmp_path / "p.jsonl"), "Line 2 of", "p.jsonl'", *words)


def test_what_is_read_is_not_written(tiny, file, tmp_path, monkeypatch):
    monkeypatch.setattr(mx, "load", lambda *args, **options: pytest.fail("the weights were read"))
    options = ("generate", "--model", tiny, "--overwrite", "--prompts")
    for make in (os.link, os.symlink, os.replace):
        (tmp_path / "x.partial").unlink(missing_ok=True)
        make(file, tmp_path / "x.partial")
        given = file if file.exists() else tmp_path / "x.partial"
        assert_refused(run(*options, given, "--output", tmp_path / "x"), "x.partial' is the file of --prompts")
        assert "Some years" in given.read_text()
    weights = (tiny / "model.safetensors").read_bytes()
    os.symlink(tiny / "model.safetensors", tmp_path / "w")
    for output in (tiny / "model.safetensors", tmp_path / "w"):
        assert_refused(run(*options, given, "--output", output), "is a file of the model")
    assert (tiny / "model.safetensors").read_bytes() == weights


@pytest.mark.skipif(sys.platform == "win32", reason="locks of Unix")
def test_two_commands_do_not_write_one_file(tiny, file, tmp_path):
    partial = tmp_path / "out.jsonl.partial"
    options = (
        "generate",
        "--model",
        tiny,
        "-n",
        2,
        "--prompts",
        file,
        "--output",
        tmp_path / "out.jsonl",
        "--overwrite",
    )
    with open(partial, "wb") as other:
        assert try_lock(other)
        other.write(b"theirs")
        other.flush()
        assert_refused(run(*options), "Another command is writing", "out.jsonl.partial")
        assert partial.read_bytes() == b"theirs"
    # A process that died has left its file, and no lock.
    assert run(*options).exit_code == 0
    assert not partial.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk of Linux")
@pytest.mark.slow
def test_a_full_disk_is_named(tiny, file, tmp_path):
    command = [sys.executable, "-m", "mistral_eqx", "generate", "hi", "-n", "1", "--model", str(tiny)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "Error: stdout, or a file that was being written, cannot be used: No space left on device." in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_bad_line_of_a_pipe_leaves_the_lines_before(tiny, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ("generate", "--model", tiny, "-n", 4, "--batch-size", 1, "--prompts", "-", "--output", out)
    result = run(*options, input='"a"\n"b"\nc\n')
    assert result.exit_code == 2
    told, error = result.stderr.splitlines()
    assert told == f"The first 2 lines are in {out}.partial."
    assert error.startswith("Error: Line 3 of stdin is not valid JSON")
    assert [line["prompt"] for line in lines((tmp_path / "out.jsonl.partial").read_text())] == ["a", "b"]
    assert not out.exists()


def test_many_prompts_are_read_as_they_are_wanted(tiny, tmp_path, monkeypatch):
    """Of a stream only as many lines as a batch has are read."""
    read = []

    class Endless:
        def readline(self, limit):
            read.append(limit)
            return b'"Call"\n'

    class Stdin:
        buffer = Endless()

    monkeypatch.setattr(sys, "stdin", Stdin)
    batches = in_batches(read_file("-", mx.load_tokenizer(tiny).encode), 4)
    assert [prompt.number for prompt in next(batches)] == [0, 1, 2, 3]
    assert len(read) == 4


def test_ctrl_c_keeps_the_texts_of_a_batch(tiny, file, tmp_path, monkeypatch):
    def stream(*args, **options):
        yield np.asarray([10, 11])
        yield np.asarray([1, 12])
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "stream", stream)
    result = run("generate", "Call", "me", "--model", tiny)
    assert result.exit_code == 130
    decode = mx.load_tokenizer(tiny).decode
    assert result.stdout == f"==> Call <==\n{decode([10])}\n\n==> me <==\n{decode([11, 12])}\n"
    assert result.stderr.startswith("prompts 2 of ")
    # Of the lines only complete ones.
    result = run("generate", "--prompts", file, "--model", tiny, "--batch-size", 2, "--output", tmp_path / "out")
    assert result.exit_code == 130
    assert [line["id"] for line in lines((tmp_path / "out.partial").read_text())] == [7]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.slow
def test_a_signal_is_answered_in_the_middle_of_a_search(tmp_path):
    """A search of minutes that does not come back to Python until its end."""
    model = save_tiny_model(tmp_path / "model", max_positions=1_000_000)
    options = ("--num-beams", 2, "-n", 100_000, "--ignore-eos", "--prompts", "-", "--output", tmp_path / "out")
    with subprocess.Popen(
        [sys.executable, "-m", "mistral_eqx", "generate", "--model", model, *map(str, options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "MISTRAL_EQX_CACHE": str(tmp_path)},
    ) as child:
        child.stdin.write(b'"Call me"')
        child.stdin.close()
        # A compiled program is kept just before it runs.
        while child.poll() is None and not list(tmp_path.glob("xla/jit_extend*")):
            time.sleep(0.1)
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        said = child.stderr.read()
    assert child.returncode == 130, said
    (line,) = said.splitlines()
    assert line.startswith(b"prompts 1 of 8 tokens | loaded in ")
    assert b" | texts 0 of 0 tokens in " in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_of_several_processes_one_reads_and_writes(tiny, tmp_path):
    """The draws and texts are those of one process; the other has no stdin to read, and no output to write."""
    options = ["generate", "--model", tiny, "-n", 9, "--temperature", 2, "--ignore-eos", "--prompts", "-"]
    options += ["--batch-size", 2, "--mesh", "tp=2", "--coordinator", f"localhost:{free_port()}", "--num-processes", 2]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mistral_eqx", *map(str, options), "--process-id", number, "--output", output],
            stdin=subprocess.PIPE if number == "0" else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), "MISTRAL_EQX_CACHE": str(tmp_path)},
        )
        for number, output in (("0", str(tmp_path / "out")), ("1", str(tmp_path / "absent" / "out")))
    ]
    given = "\n".join(json.dumps({"prompt": prompt, "of": "process 0"}) for prompt in PROMPTS)
    said = [process.communicate(given if number == 0 else None, timeout=120) for number, process in enumerate(started)]
    assert [process.returncode for process in started] == [0, 0], said
    found = lines((tmp_path / "out").read_text("utf-8"))
    assert [line["text"] for line in found] == library(
        tiny, max_new_tokens=9, sampler=mx.Sampler(temperature=2.0)
    ).texts
    assert {line["of"] for line in found} == {"process 0"}
    assert said[1] == ("", "")
