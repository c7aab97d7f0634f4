"""A signal ends a command at once, in one line, with nothing half written.

The default suite sends a few signals at chosen moments. `INTERRUPTIONS=100 pytest -m slow -s tests/test_interrupts.py`
sends so many at random ones: every fifth to a process that has just begun, the others to one that has imported all.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from fixtures.cli import save_tiny_model

import mistral_eqx as mx
from mistral_eqx import interrupts
from mistral_eqx.cli.background import Background, interruptible


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")

INTERRUPTIONS = int(os.environ.get("INTERRUPTIONS", "12"))


@pytest.fixture(scope="module", autouse=True)
def _not_ignored():
    """A shell lets commands in the background ignore ctrl-C, and so would those that are started here."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def command(*arguments, cache, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "mistral_eqx", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "MISTRAL_EQX_CACHE": str(cache)},
        text=True,
        **options,
    )


def wait_for_handler(process):
    """Waits until the process answers signals: Python's own start cannot."""
    if sys.platform != "linux":
        time.sleep(1)
        return
    # The thread that it answers them by is its second.
    while process.poll() is None and "Threads:\t1\n" in Path(f"/proc/{process.pid}/status").read_text():
        time.sleep(0.001)


def program(text, *arguments):
    """Runs a program that takes itself for the command line, and gives its exit code, stdout and stderr."""
    head = "import os, signal, sys, time\nsys.argv[0] = 'mistral-eqx'\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(text), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "Interrupted.\n"), (signal.SIGTERM, "Terminated.\n")])
def test_a_signal_before_anything_is_imported(tiny, tmp_path, number, said):
    with command("generate", "Hi", "--model", tiny, cache=tmp_path) as process:
        wait_for_handler(process)
        process.send_signal(number)
        sent = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", said)
    assert time.monotonic() - sent < 3


def test_in_native_code_nothing_is_waited_for_and_what_is_half_written_goes(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    found = program(
        """
        from mistral_eqx.checkpoint import safetensors, writing

        def create(path, tensors):
            path.write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        writing.safetensors.create = create
        from mistral_eqx.cli import main
        main()
        """,
        "convert",
        tiny,
        tmp_path / "out",
    )
    assert found == (130, "", "Interrupted.\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failing_end_does_not_wait_for_native_code():
    # As of a text whose reader is gone while the next token is decoded.
    code, out, err = program(
        """
        import threading
        import jax, jax.numpy as jnp
        import mistral_eqx.cli

        def app():
            step = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, x: jnp.sin(x), x))
            x = step(jnp.ones(100_000))
            def go_on():
                while True:
                    step(x).block_until_ready()
            threading.Thread(target=go_on, daemon=True).start()
            time.sleep(0.2)
            sys.exit(3)
        mistral_eqx.cli.app = app
        mistral_eqx.cli.main()
        """
    )
    assert (code, out, err) == (3, "", "")


def test_what_fails_while_the_process_ends_is_no_error():
    found = program(
        """
        from mistral_eqx import interrupts
        import mistral_eqx.cli

        def undo():
            global undone
            undone = True
            time.sleep(0.5)
        def app():
            with interrupts.undone_by(undo):
                os.kill(os.getpid(), signal.SIGINT)
                while not undone:
                    pass
                raise ValueError("what was being written is gone")
        undone = False
        mistral_eqx.cli.app = app
        mistral_eqx.cli.main()
        """
    )
    assert found == (130, "", "Interrupted.\n")


def test_the_second_signal_does_not_wait():
    found = program(
        """
        from mistral_eqx import interrupts
        with interrupts.answered(lambda: print("first", flush=True)):
            os.kill(os.getpid(), signal.SIGINT)
            while interrupts.came() is None:
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        """
    )
    assert found == (143, "first\n", "")


def test_what_must_be_whole_is_finished_first():
    found = program(
        """
        from mistral_eqx import interrupts
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
            print("whole", flush=True)
        time.sleep(60)
        """
    )
    assert found == (130, "whole\n", "Interrupted.\n")


def test_a_signal_that_nobody_took_is_raised_at_the_end():
    found = program(
        """
        from mistral_eqx import interrupts
        try:
            with interrupts.answered():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
        except KeyboardInterrupt:
            print("raised")
            interrupts.forgive()
        with interrupts.answered():
            pass
        print("goes on")
        """
    )
    assert found == (0, "raised\ngoes on\n", "")


def test_a_child_has_the_systems_signals():
    found = program(
        """
        import mistral_eqx
        import warnings
        warnings.simplefilter("ignore")
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status))
        time.sleep(0.5)
        """
    )
    assert found == (0, f"{int(signal.SIGINT)}\n", "")


def test_an_ignored_signal_stays_ignored():
    found = program(
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        import mistral_eqx
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        print("goes on")
        """
    )
    assert found == (0, "goes on\n", "")


def test_a_library_leaves_the_signals_of_its_program_alone():
    assert not interrupts._stands_by
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_thread_gives_what_an_iterable_gives():
    assert list(Background(lambda: range(5))) == [0, 1, 2, 3, 4]
    assert interruptible(lambda: "result") == "result"
    for wrong in (ValueError("no"), KeyboardInterrupt()):

        def make(wrong=wrong):
            yield 1
            raise wrong

        seen = []
        with pytest.raises(type(wrong)):
            seen.extend(item for item in Background(make))
        assert seen == [1]


def test_a_thread_takes_no_more_than_is_wanted():
    taken = []

    def make():
        for number in range(10):
            taken.append(number)
            yield number

    background = Background(make, ahead=False)
    for item in background:
        time.sleep(0.01)
        assert taken == list(range(item + 1))
        if item == 3:
            break
    background.stop()
    assert taken == [0, 1, 2, 3]


def test_a_signal_ends_the_wait_and_not_the_thread(monkeypatch):
    going, end = threading.Event(), threading.Event()

    def make():
        yield 1
        going.set()
        end.wait(60)
        yield 2

    def signalled(item):
        going.wait(60)
        monkeypatch.setattr(interrupts, "_came", signal.SIGINT)
        for wake in interrupts._wakes:
            wake()
        return item

    seen, background = [], Background(make)
    with pytest.raises(KeyboardInterrupt):
        seen.extend(signalled(item) for item in background)
    interrupts.forgive()
    assert seen == [1]
    assert background._thread.is_alive()
    end.set()
    background.stop()
    assert interrupts._wakes == []


def test_a_signal_in_pythons_own_end_is_too_late():
    """There Python has taken its handlers away."""
    code, out, err = program(
        """
        import mistral_eqx

        class Late:
            def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
                kill(process, number)

        late = Late()
        print("complete")
        """
    )
    assert (code, out, err) == (0, "complete\n", "")


# ---- at random moments


RECIPE = """
folder = "{folder}"

[model]
name = "gpt-nano"
config = {{layers = 1, embed = 16, hidden = 32}}

[data]
kind = "sort"
options = {{length = 3, symbols = 4}}
rows = 8

[optimizer]
learning_rate = 1e-2

[training]
steps = 40
compute_dtype = "float32"
remat = "none"
save_every = 20
evaluate_every = 40
log_every = 20
"""


class Forked:
    """A command in a fork of a process that has imported everything: the seconds before are spared.

    It has as much of `subprocess.Popen` as is needed here.
    """

    context = multiprocessing.get_context("forkserver")

    def __init__(self, arguments, stdin, said, cache):
        self._said, ready = said, said.with_suffix(".err")
        ready.unlink(missing_ok=True)
        arguments = [str(argument) for argument in arguments]
        self._process = self.context.Process(target=_command, args=(arguments, stdin, said, cache))
        self._process.start()
        self.pid = self._process.pid
        # Before that Python's own handler is there.
        while not ready.exists() and self._process.is_alive():
            time.sleep(0.001)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.join()

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self._process.is_alive():
            os.kill(self.pid, number)

    def communicate(self, timeout):
        self._process.join(timeout)
        return tuple(self._said.with_suffix(suffix).read_text() for suffix in (".out", ".err"))

    @property
    def returncode(self):
        return self._process.exitcode


Forked.context.set_forkserver_preload(["mistral_eqx.cli", "mistral_eqx.public", "orbax.checkpoint"])


def _command(arguments, stdin, said, cache):
    interrupts.stand_by()
    for number, (name, path) in enumerate(
        (("stdin", stdin), ("stdout", said.with_suffix(".out")), ("stderr", said.with_suffix(".err")))
    ):
        mode = "w" if number else "r"
        with open(path, mode) as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, os.fdopen(number, mode, closefd=False))
    os.environ["MISTRAL_EQX_CACHE"] = str(cache)
    sys.argv = ["mistral-eqx", *arguments]
    from mistral_eqx.cli import main

    main()


class Commands:
    """Small runs of each command, and what must hold of what they leave behind."""

    names = ("generate", "prompts", "convert", "train", "evaluate", "chat")

    def __init__(self, tiny, folder):
        self.folder = folder
        (folder / "turns").write_text("Hello\nAnd you?\n")
        (folder / "prompts").write_text("".join(json.dumps(f"Prompt {number}") + "\n" for number in range(6)))
        (folder / "text").write_text("What is measured is a text of some length. " * 60)
        generate = ("generate", "--model", tiny, "-n", 30, "--ignore-eos", "--temperature", 2)
        prompts = ("--prompts", folder / "prompts", "--batch-size", 2, "-o", folder / "out", "--overwrite")
        self.arguments = {
            "generate": (*generate, "Hi"),
            "prompts": (*generate, *prompts),
            "convert": ("convert", tiny, folder / "converted", "--format", "mistral"),
            "evaluate": ("evaluate", "perplexity", "--model", tiny, "--text", folder / "text", "--stride", 128),
            "chat": ("chat", "--model", tiny, "-n", 20),
        }

    def start(self, name, number, cache, *, anew):
        arguments = self.arguments.get(name)
        if name == "train":
            # Each run is one of its own.
            recipe = self.folder / f"{number}.toml"
            recipe.write_text(RECIPE.format(folder=self.folder / f"run-{number}"))
            arguments = ("train", recipe)
        stdin = self.folder / "turns" if name == "chat" else Path(os.devnull)
        if anew:
            with stdin.open() as lines:
                return command(*arguments, cache=cache, stdin=lines)
        return Forked(arguments, stdin, self.folder.parent / f"{self.folder.name}-said", cache)

    def check(self, name, number, code, out):
        """Checks that what is there is whole, and takes it away."""
        match name:
            case "prompts":
                self._check_lines(code)
            case "convert":
                assert code != 0 or (self.folder / "converted").exists()
                self._check_model(self.folder / "converted")
            case "train":
                assert code != 0 or (self.folder / f"run-{number}" / "model").exists()
                self._check_model(self.folder / f"run-{number}" / "model")
            case "evaluate":
                assert len(out.splitlines()) in ((3,) if code == 0 else (0, 3))
        assert not [file.name for file in self.folder.iterdir() if file.name.startswith(".")]

    def _check_lines(self, code):
        output, partial = self.folder / "out", self.folder / "out.partial"
        for file in (output, partial):
            if file.exists():
                lines = file.read_text().splitlines(keepends=True)
                assert lines, f"{file} is empty"
                assert all(line.endswith("\n") and json.loads(line)["tokens"] == 30 for line in lines)
                assert file == partial or len(lines) == 6
                file.unlink()
        assert code != 0 or not partial.exists()

    def _check_model(self, path):
        if path.exists():
            mx.load(path)
            shutil.rmtree(path)


@pytest.mark.slow
def test_a_signal_at_any_moment(tiny, tmp_path):
    commands, draw, ends = Commands(tiny, tmp_path), random.Random(), []

    def undisturbed(start):
        started = time.monotonic()
        with start as whole:
            out, err = whole.communicate(timeout=600)
        assert whole.returncode == 0, err
        return time.monotonic() - started, out

    importing, _ = undisturbed(command("inspect", tiny, cache=tmp_path / "cache"))
    seconds = {}
    for number, name in enumerate(Commands.names, INTERRUPTIONS + 1):
        seconds[name], out = undisturbed(commands.start(name, number, tmp_path / "cache", anew=False))
        commands.check(name, number, 0, out)
    print(f"importing {importing:.1f} s, then {seconds}")  # noqa: T201
    for number in range(INTERRUPTIONS):
        name, anew = Commands.names[number % len(Commands.names)], number % 5 == 0
        # Every second one finds its programs compiled.
        cache = tmp_path / ("cache" if number // len(Commands.names) % 2 else f"cache-{number}")
        kind = signal.SIGTERM if draw.random() < 0.1 else signal.SIGINT
        with commands.start(name, number, cache, anew=anew) as process:
            wait_for_handler(process)
            wait = draw.random() * (seconds[name] + importing * anew)
            time.sleep(wait)
            process.send_signal(kind)
            sent = time.monotonic()
            out, err = process.communicate(timeout=120)
        took, code, last = time.monotonic() - sent, process.returncode, (err.splitlines() or [""])[-1]
        print(f"{number} {name} {kind.name} after {wait:.2f} s: {code} in {took:.2f} s {last[:80]!r}")  # noqa: T201
        assert code in (0, 128 + kind), err
        for word in ("Traceback", "Exception", "Error", "Fatal", "terminate", "Aborted", "Warning"):
            assert word not in err, err
        if code:
            # One line, or one more: of a signal that came after the metrics, or of the file that has the texts so far.
            # Training also says how far it is.
            more = last in ("Interrupted.", "Terminated.") or (name == "prompts" and last.startswith("The first "))
            assert len(err.splitlines()) == 1 or (more and len(err.splitlines()) == 2) or name == "train", err
            ends.append((name, took))
        commands.check(name, number, code, out)
        if cache.name != "cache":
            shutil.rmtree(cache, ignore_errors=True)
    slowest = max(took for name, took in ends if name != "train")
    print(f"{INTERRUPTIONS} signals, {len(ends)} in time; the slowest end took {slowest:.2f} s")  # noqa: T201
    assert slowest < 10
