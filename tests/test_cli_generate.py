import json
import os
import re
import signal
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from fixtures.cli import assert_refused, run, save_tiny_model

import mistral_eqx as mx
from mistral_eqx import cli
from mistral_eqx.cli import report
from mistral_eqx.nn.kernels import native


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    # The cache of compiled programs is a setting of the whole process: other tests are to run without it.
    monkeypatch.setattr("mistral_eqx.cli.loading._keep_compiled_programs", lambda: None)
    monkeypatch.setenv("MISTRAL_EQX_CACHE", str(tmp_path / "cache"))


class Streamed:
    """Stands for what `mx.stream` returns."""

    acceptance = None

    def __init__(self, tokens):
        self._tokens = tokens

    def __iter__(self):
        return self._tokens


def continuation(model, text, **options):
    """What the library says of the same prompt."""
    tokenizer = mx.load_tokenizer(model)
    out = mx.generate(mx.load(model), [tokenizer.encode(text)], key=jr.key(0), **{"eos_id": (), **options})
    return tokenizer.decode(out.tokens[0, : int(out.lengths[0])].tolist())


def process(*arguments, cache, **options):
    """Starts the command as a process of its own, which has signals and pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "mistral_eqx", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "MISTRAL_EQX_CACHE": str(cache)},
        **options,
    )


@pytest.mark.slow
def test_figures_are_a_table_on_a_terminal_and_can_be_left_out(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report.show([("prompt", "8 tokens"), ("first token", "after 0.10 s")])
    assert re.fullmatch(
        r"prompt       8 tokens\nfirst token  after 0.10 s\npeak memory  [\d,]+ MB\n", capsys.readouterr().err
    )
    for more in ([], ["Again"]):
        result = run("generate", "Call me", *more, "--model", tiny, "-n", 2, "--quiet")
        assert result.stdout
        assert result.stderr == ""


def test_the_continuation_is_on_stdout_and_figures_on_stderr(tiny):
    result = run("generate", "Call me", "--model", tiny, "-n", 9, "--ignore-eos")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == continuation(tiny, "Call me", max_new_tokens=9) + "\n"
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(
        r"prompt 8 tokens \| loaded in [\d.]+ s as float32, matmul precision highest \| "
        r"first token after [\d.]+ s( \(.*\))? \| "
        r"decoded 8 more at [\d.]+ tokens/s( \(.*\))? \| peak memory [\d,]+ MB",
        line,
    )


def test_sampling_options_reach_the_sampler(tiny):
    options = ("--temperature", 5.0, "--top-k", 40, "--top-p", 0.99, "--ignore-eos", "-n", 20)
    first = run("generate", "Call me", "--model", tiny, *options)
    again = run("generate", "Call me", "--model", tiny, *options)
    other = run("generate", "Call me", "--model", tiny, *options, "--seed", 1)
    sampler = mx.Sampler(temperature=5.0, top_k=40, top_p=0.99)
    assert first.stdout == continuation(tiny, "Call me", max_new_tokens=20, sampler=sampler) + "\n"
    assert first.stdout == again.stdout != other.stdout


def test_a_text_ends_at_the_end_token_unless_told_otherwise(tiny, monkeypatch):
    ids = iter([[5], [6], [1]])
    asked = {}

    def stream(model, prompts, **options):
        asked.update(options)
        return Streamed(ids)

    monkeypatch.setattr(mx, "stream", stream)
    result = run("generate", "Call me", "--model", tiny)
    assert asked["eos_id"] == (1,)
    assert result.stdout == mx.load_tokenizer(tiny).decode([5, 6]) + "\n"
    run("generate", "Call me", "--model", tiny, "--ignore-eos")
    assert asked["eos_id"] == ()


@pytest.mark.parametrize("arguments", [("-",), ()])
def test_the_prompt_may_come_from_stdin(tiny, arguments):
    expected = run("generate", "Call\nme", "--model", tiny, "-n", 5).stdout
    assert run("generate", *arguments, "--model", tiny, "-n", 5, input="Call\nme\n").stdout == expected


def test_the_weights_are_cast_on_request(tiny, monkeypatch):
    dtypes = []
    load = mx.load
    monkeypatch.setattr(mx, "load", lambda *args, dtype, **options: dtypes.append(dtype) or load(*args, **options))
    run("generate", "Call me", "--model", tiny, "-n", 2, "--dtype", "bfloat16")
    run("generate", "Call me", "--model", tiny, "-n", 2)
    assert dtypes == ["bfloat16", None]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["", "--model", "{tiny}"], ["The prompt is empty"]),
        (["hi", "--model", "{tiny}", "--top-p", "1.5"], ["--top-p is 1.5"]),
        (["hi", "--model", "{tiny}", "--top-k", "0"], ["--top-k is 0"]),
        (["hi", "--model", "{tiny}", "--temperature=-1"], ["--temperature is -1"]),
        (["hi", "--model", "{tiny}", "--max-new-tokens", "-3"], ["--max-new-tokens is -3"]),
        (["hi", "--model", "{tiny}", "--seed", "-1"], ["--seed"]),
        (["hi", "--model", "{tiny}", "--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["hi", "--model", "{tiny}", "--bogus"], ["No such option", "--bogus"]),
        (["x" * 300, "--model", "{tiny}"], ["context of 256 tokens"]),
        (["hi", "--model", "{tiny}", "-n", "10000"], ["context of 256 tokens"]),
        (["hi", "--model", "smolm2-135m"], ["'smolm2-135m'", "Did you mean 'smollm2-135m'?"]),
        (["hi", "--model", "7b-v0.1"], ["'7b-v0.1' is only a shape"]),
        (["hi", "--model", "{empty}"], ["{empty}"]),
        (["hi", "--model", "{empty}/absent.gguf"], ["{empty}/absent.gguf"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tiny, tmp_path, arguments, words):
    places = {"tiny": str(tiny), "empty": str(tmp_path / "empty")}
    (tmp_path / "empty").mkdir()
    result = run("generate", *(argument.format(**places) for argument in arguments))
    assert_refused(result, *(word.format(**places) for word in words))


def test_a_text_that_does_not_fit_is_refused_before_the_weights_are_read(tiny, monkeypatch):
    monkeypatch.setattr(mx, "load", lambda *args, **options: pytest.fail("the weights were read"))
    assert_refused(run("generate", "hi", "--model", tiny, "-n", 10_000), "10000 new ones", "context of 256 tokens")


@pytest.mark.parametrize("arguments", [["--bogus"], ["--model", "x", "generate", "hi"], ["bogus"], ["--bogus", "chat"]])
def test_a_mistake_before_the_command_is_one_sentence_too(arguments):
    assert_refused(run(*arguments), "No such", arguments[0])


def test_without_a_command_there_is_help():
    result = run()
    assert result.exit_code == 2
    assert "Usage: mistral-eqx" in result.stderr


def test_a_damaged_checkpoint_is_one_sentence(tiny, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(run("generate", "hi", "--model", tmp_path), str(weights))


def test_check_refuses_weights_that_are_not_finite(tiny, tmp_path):
    import jax.numpy as jnp

    model = mx.load(tiny)
    broken = model.blocks[1].feed_forward_norm.weight.at[3].set(jnp.nan)
    import equinox as eqx

    model = eqx.tree_at(lambda model: model.blocks[1].feed_forward_norm.weight, model, broken)
    mx.save(model, tmp_path / "broken", format="hf", allow_nonfinite=True)
    (tmp_path / "broken" / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    assert_refused(run("generate", "hi", "--model", tmp_path / "broken", "--check"), "post_attention_layernorm.weight")


@pytest.mark.parametrize("arguments", [("generate", "hi", "--debug"), ("--debug", "generate", "hi")])
def test_debug_shows_the_traceback(arguments):
    result = run(*arguments, "--model", "absent.gguf")
    assert isinstance(result.exception, ValueError)
    assert "absent.gguf" in str(result.exception)


def test_ctrl_c_keeps_what_was_decoded(tiny, monkeypatch):
    def tokens():
        yield [10]
        yield [11]
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "stream", lambda *args, **options: Streamed(tokens()))
    result = run("generate", "Call me", "--model", tiny)
    assert result.exit_code == 130
    assert result.stdout == mx.load_tokenizer(tiny).decode([10, 11]) + "\n"
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of Unix")
@pytest.mark.slow
def test_a_signal_and_a_closed_pipe_are_quiet(tmp_path):
    model = save_tiny_model(tmp_path / "model", max_positions=200_000)
    arguments = ("generate", "Call me", "--model", model, "--ignore-eos", "--temperature", 5, "-n", 50_000)
    with process(*arguments, cache=tmp_path) as interrupted, process(*arguments, cache=tmp_path) as closed:
        first = [child.stdout.read(20) for child in (interrupted, closed)]
        interrupted.send_signal(signal.SIGINT)
        closed.stdout.close()
        rest, figures = interrupted.communicate(timeout=60)
        silence = closed.stderr.read()
    assert [len(text) for text in first] == [20, 20]
    assert rest.endswith(b"\n")
    assert b"tokens/s" in figures
    assert b"Traceback" not in figures
    assert silence == b""
    assert (interrupted.returncode, closed.returncode) == (130, 141)
    # Compiled programs are kept for the next run.
    assert any((tmp_path / "xla").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="the shell of Unix")
@pytest.mark.parametrize(
    ("arguments", "closed", "code"),
    [
        ("generate hi --model {tiny} -n 4", ">&-", 141),
        *(
            pytest.param(*case, marks=pytest.mark.long if number % 2 else pytest.mark.slow)
            for number, case in enumerate(
                [
                    ("inspect {tiny}", ">&-", 141),
                    ("--help", ">&-", 141),
                    ("convert {tiny} {out}", ">&-", 0),
                    ("generate hi --model {tiny} -n 4", "2>&-", 0),
                    ("generate --model {tiny}", "<&-", 2),
                    ("generate hi --model {tiny} -n 4", "<&- >&- 2>&-", 141),
                ]
            )
        ),
    ],
)
def test_a_closed_stream_is_quiet(tiny, tmp_path, arguments, closed, code):
    places = {"tiny": tiny, "out": tmp_path / "out"}
    done = subprocess.run(
        f"{sys.executable} -m mistral_eqx {arguments.format(**places)} {closed}",
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MISTRAL_EQX_CACHE": str(tmp_path)},
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    kernels = native.instructions()
    ending = "without C++ kernels" if kernels is None else f"C++ kernels for {kernels}"
    assert re.fullmatch(rf"mistral-eqx \d+\.\d+\.\d+\S*, {re.escape(ending)}\n", result.stdout)


@pytest.mark.slow
def test_a_prompt_and_messages_in_the_chat_template(tiny, tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    tokenizer = mx.load_tokenizer(tiny)
    out = mx.generate(
        mx.load(tiny), [mx.encode_chat(tokenizer, messages)], max_new_tokens=5, eos_id=(), tokenizer=tokenizer
    )
    options = ("--model", tiny, "-n", 5, "--ignore-eos")
    assert run("generate", "Hello", "--chat", *options).stdout == out.texts[0] + "\n"
    line = json.dumps({"id": 1, "messages": messages})
    written = json.loads(run("generate", "--prompts", "-", *options, input=line).stdout)
    assert (written["id"], written["messages"], written["text"]) == (1, messages, out.texts[0])


def test_a_text_that_ends_at_once_is_a_hint(tiny, monkeypatch):
    monkeypatch.setattr(mx, "stream", lambda *arguments, **options: Streamed(iter([[1]])))
    assert "try --chat" in run("generate", "Hi", "--model", tiny).stderr
    assert "--chat" not in run("generate", "Hi", "--model", tiny, "--chat").stderr
    assert "--chat" not in run("generate", "Hi", "--model", tiny, "-n", 1).stderr


@pytest.mark.slow
def test_adapters_take_part(tiny, tmp_path, monkeypatch):
    model = mx.apply_lora(mx.load(tiny), rank=2, alpha=64.0, key=jr.key(1))
    # Adapters begin with zeros, which change nothing.
    arrays, others = eqx.partition(model, eqx.is_array)
    model = eqx.combine(jax.tree.map(lambda leaf: jnp.where(leaf == 0, 0.1, leaf), arrays), others)
    mx.save_lora(model, tmp_path / "adapters")
    tokenizer = mx.load_tokenizer(tiny)
    out = mx.generate(model, "Hi", max_new_tokens=9, eos_id=(), tokenizer=tokenizer)
    options = ("generate", "Hi", "--model", tiny, "-n", 9, "--ignore-eos")
    found = run(*options, "--adapter", tmp_path / "adapters")
    assert found.stdout == out.texts[0] + "\n" != run(*options).stdout
    monkeypatch.setattr(mx, "load", lambda *arguments, **options: pytest.fail("the weights were read"))
    assert_refused(run(*options, "--adapter", tmp_path), "adapter_config.json")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["generate", "--help"], "Continue a prompt."), (["plan", "--x"], "--x"), (["--version"], "C++ kernels")],
)
def test_what_needs_no_model_needs_nothing_heavy(arguments, said):
    script = (
        "import sys\n"
        "from mistral_eqx.cli import app\n"
        f"try:\n    app({arguments})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'jax', 'equinox', 'rich.progress', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said in result.stdout + result.stderr
    assert result.stdout.endswith("[]\n")


def test_every_command_is_in_the_help():
    result = run("--help")
    for command in cli.app.registered_commands:
        assert f"  {command.callback.__name__} " in result.stdout


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (("--mesh", "tp=2"), "heads on tp=2"),
        (("--mesh", "kv=2,rep=2"), "kv_replicated on kv=2,rep=2"),
        (("--mesh", "kv=2,rep=2", "--strategy", "HEADS-x-kv-seq"), "heads_x_kv_seq on kv=2,rep=2"),
        (
            ("--mesh", "dp=2,tp=2", "--strategy", "heads batch@dp"),
            "heads batch@dp on dp=2,tp=2",
        ),
        (("--mesh", "a=2", "--strategy", "hidden@a"), "hidden@a on a=2"),
    ],
)
@pytest.mark.slow
def test_a_model_on_a_mesh_says_the_same_and_where_it_is(tiny, options, where):
    result = run("generate", "Call me", "--model", tiny, "-n", 6, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == continuation(tiny, "Call me", max_new_tokens=6, eos_id=1) + "\n"
    assert f" | strategy {where} | " in result.stderr


def test_a_strategy_of_one_axis_takes_all_devices(tiny, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    result = run("generate", "Call me", "--model", tiny, "-n", 2, "--strategy", "heads")
    assert result.exit_code == 0, result.stderr
    assert " | strategy heads on tp=2 | " in result.stderr
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    result = run("generate", "Call me", "--model", tiny, "--strategy", "heads")
    assert_refused(result, "There is one device", "add, for example, --mesh tp=2.")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mesh", "tp"), "The mesh 'tp' must name its axes and their sizes, such as 'tp=8' or 'dp=2,tp=4'."),
        (("--mesh", "tp=512"), "JAX_NUM_CPU_DEVICES=512"),
        (("--mesh", "tp=3"), "2 kv_heads cannot be split over 3 devices"),
        (("--mesh", "x=2"), "No strategy has a name and the axes x; call them tp, or kv and rep, or write the layout"),
        (("--mesh", "tp=2", "--strategy", "kv_replicated"), "over the mesh axis 'kv', but the mesh has 'tp' (2)"),
        (
            ("--mesh", "tp=2", "--strategy", "head"),
            "There is no strategy 'head'; the names are single, heads, sequence_parallel",
        ),
        (("--mesh", "tp=2", "--strategy", "heds@tp"), "splits 'heds', which is not a dimension"),
        (("--mesh", "pp=2", "--strategy", "layers@pp"), "into stages, which only 'mistral-eqx train' does"),
        (("--strategy", "kv-replicated"), "add, for example, --mesh kv=2,rep=2."),
        (("--num-processes", 2), "--coordinator, --num-processes and --process-id; give all three"),
        (("--coordinator", "auto"), "Neither SLURM nor Cloud TPU nor Open MPI started this process"),
        (("--coordinator", "auto", "--process-id", 0), "--coordinator auto finds out"),
        (
            ("--coordinator", "localhost:9000", "--num-processes", 2, "--process-id", 2),
            "--process-id is 2; with 2 processes it must be from 0 to 1.",
        ),
        (
            ("--coordinator", "localhost", "--num-processes", 2, "--process-id", 0),
            "The coordinator 'localhost' must be the host of process 0 and a free port there",
        ),
    ],
)
def test_devices_that_do_not_fit_are_refused_before_the_weights_are_read(tiny, options, said, monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("The weights were read.")

    monkeypatch.setattr(mx, "load", load)
    assert_refused(run("generate", "Call me", "--model", tiny, *options), said)


@pytest.mark.slow
def test_virtual_devices_are_made_for_the_mesh_unless_their_number_was_asked_for(tiny, tmp_path):
    options = ("generate", "Call me", "--model", tiny, "-n", 1, "--mesh", "tp=2")
    for number, code in ((None, 0), ("1", 2)):
        environment = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
        if number is not None:
            environment["JAX_NUM_CPU_DEVICES"] = number
        done = subprocess.run(
            [sys.executable, "-m", "mistral_eqx", *map(str, options)],
            env={**environment, "MISTRAL_EQX_CACHE": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert ("takes 2 devices and there are 1" if code else "heads on tp=2") in done.stderr


@pytest.mark.slow
def test_a_text_follows_a_grammar(tiny, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}')
    (tmp_path / "sums.lark").write_text('start: N ("+" N){1,3}\nN: /[1-9]{2}/')
    options = ("Call me", "--model", tiny, "-n", 200, "--quiet", "--temperature", 5.0)
    found = run("generate", *options, "--json-schema", tmp_path / "schema.json")
    assert found.exit_code == 0, found.stderr
    assert set(json.loads(found.stdout)) <= {True, False}
    both = run("generate", "Hi", *options, "--grammar", tmp_path / "sums.lark").stdout.splitlines()
    assert len([line for line in both if re.fullmatch(r"[1-9]{2}(\+[1-9]{2}){1,3}", line)]) == 2
    found = run("generate", *options, "--regex", "[ab]{2,5}x", "--logprobs", 1).stdout
    assert re.fullmatch("[ab]{2,5}x", found.splitlines()[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--regex", "(a"], ["The regular expression is wrong"]),
        (["--regex", "a", "--grammar", "x"], ["--regex and --grammar both say"]),
        (["--regex", "a", "--ignore-eos"], ["--regex", "--ignore-eos"]),
        (["--regex", "a", "--num-beams", "2"], ["--regex does not combine with --num-beams"]),
        (["--json-schema", "absent.json"], ["absent.json"]),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_before_the_weights_are_read(tiny, monkeypatch, arguments, words):
    monkeypatch.setattr(mx, "load", lambda *args, **options: pytest.fail("the weights were read"))
    assert_refused(run("generate", "hi", "--model", tiny, *arguments), *words)
