"""Sessions: `nox -l` lists them, `nox -s NAME` runs one in a virtual environment of its own."""

import os

import nox


nox.options.sessions = ["lint", "types", "docs", "tests", "tests_plain"]
# Only `newest` names interpreters. It runs on those that are installed and is skipped for the others.
nox.options.error_on_missing_interpreters = False

# Each core runs files of its own. A process takes up to 1.5 GB, so there are never many.
PARALLEL = ("-n", "logical", "--maxprocesses", "8", "--dist", "loadfile")
# Many of the slow tests wait for processes that they start: two workers kept 1.2 cores busy.
ONE_MORE = ("-n", str(min((os.cpu_count() or 1) + 1, 8)), "--dist", "loadfile")
# Thousands of programs are compiled, each for a few numbers; a quarter to a third of the time went to optimizing them.
# XLA's own passes stay as they are. The sessions `tests_plain` and `parity` run what users run.
COMPILE_QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
# Without the import hook that checks shapes, which takes a fifth of the time of a test that compiles.
PLAIN = ("-o", "addopts=--strict-markers --strict-config -ra")
# These compute for longer than they compile: the real model, and millions of draws.
COMPUTE_LONG = tuple(
    f"tests/test_{name}.py" for name in ("generation_sampler", "invariance", "quant_awq", "quant_gptq", "readme")
)


def install(session: nox.Session, extras: str, *others: str):
    """Installs the package with some extras. `checks` has built it already, once for all its parts."""
    package = [f"mistral-eqx[{extras}]"] if session.name == "checks" else ["-e", f".[{extras}]"]
    session.install(*package, *others)


@nox.session
def tests(session: nox.Session):
    """The default suite, every annotated shape checked on the way."""
    install(session, "test")
    options = ["-m", "not parity and not slow", "--durations=15", *PARALLEL]
    session.run("pytest", *options, *session.posargs, env=COMPILE_QUICKLY)


@nox.session(python=["3.14", "3.13"])
def newest(session: nox.Session):
    """The default suite on newer Pythons, which have newer releases of JAX than Python 3.11."""
    tests(session)


@nox.session
def tests_slow(session: nox.Session):
    """What takes too long for the default suite: many steps under every strategy, the real model; as users run it."""
    install(session, "test")
    options = ["-m", "slow and not long and not parity", "--durations=10", *PLAIN, *ONE_MORE, *session.posargs]
    others = [f"--ignore={file}" for file in COMPUTE_LONG]
    session.run("pytest", *options, *others, env=COMPILE_QUICKLY)
    session.run("pytest", *options, *COMPUTE_LONG)


@nox.session
def tests_long(session: nox.Session):
    """More layouts and types of what the slow tests hold; run it after a change of what they share."""
    install(session, "test")
    session.run("pytest", "-m", "long and not parity", *PLAIN, *ONE_MORE, *session.posargs, env=COMPILE_QUICKLY)


@nox.session
def tests_plain(session: nox.Session):
    """The core of the suite without the import hook, as users run the package."""
    install(session, "test")
    core = ["tests/test_nn_model.py", "tests/test_generation_loop.py", "tests/test_checkpoint_loading.py"]
    session.run("pytest", "-m", "not parity and not slow", *PLAIN, *PARALLEL, *core)


@nox.session
def parity(session: nox.Session):
    """Comparisons, live, with torch, transformers and mistral-common."""
    # pip, and this release: other resolvers and releases take a build for GPUs, of several gigabytes.
    session.install("torch==2.13.0")
    install(session, "test,eval", "transformers>=5.23,<6", "protobuf", "accelerate", "peft>=0.17")
    session.install("bitsandbytes>=0.46", "compressed-tensors>=0.10")
    session.run("pytest", "-m", "parity", "--durations=10", *PLAIN, *PARALLEL, *session.posargs)


@nox.session
def equality(session: nox.Session):
    """Many more random models, strategies and ZeRO stages, each compared with one device; takes up to an hour."""
    install(session, "test")
    session.run(
        "pytest",
        "tests/test_equality.py",
        "tests/test_train_zero.py",
        "-s",
        *session.posargs,
        env={"EQUALITY_PAIRS": "500"},
    )


@nox.session
def invariance(session: nox.Session):
    """Many more random batches, each row held to what it gives alone, and SmolLM2's; takes some minutes."""
    install(session, "test")
    session.run("pytest", "tests/test_invariance.py", "-s", *session.posargs, env={"INVARIANCE_EXAMPLES": "300"})


@nox.session
def engine(session: nox.Session):
    """Many more random requests to engines under each strategy, each compared with `generate`; takes half an hour."""
    install(session, "test")
    options = ["tests/test_engine.py", "-m", "slow", *PLAIN, *PARALLEL, *session.posargs]
    session.run("pytest", *options, env={**COMPILE_QUICKLY, "ENGINE_EXAMPLES": "50"})


@nox.session
def robust(session: nox.Session):
    """2000 requests of clients that go away or send nonsense, thousands of wrong bodies, 500 schemas; some minutes."""
    install(session, "test")
    tests = [f"tests/test_{name}.py" for name in ("server_robust", "server_bodies", "server_openapi", "text_grammar")]
    counts = {"ROBUST_REQUESTS": "2000", "BODIES": "5000", "OPENAPI_EXAMPLES": "300", "GRAMMAR_SCHEMAS": "500"}
    session.run("pytest", *tests, "-m", "slow", "-s", *PLAIN, *session.posargs, env=counts)


@nox.session
def gptq(session: nox.Session):
    """GPTQ on every linear layer of SmolLM2, each with less error than rounding to nearest; takes some minutes."""
    install(session, "test")
    session.run("pytest", "tests/test_quant_gptq.py", "-m", "slow", *PLAIN, *session.posargs, env={"GPTQ_BLOCKS": "30"})


@nox.session
def fuzz(session: nox.Session):
    """Ten minutes of damaged files, settings and options: each refused in one sentence, or accepted and right."""
    install(session, "test")
    session.run("python", "tests/fuzz", *(session.posargs or ["--seconds", "600"]))


@nox.session
def lint(session: nox.Session):
    """Style and common mistakes."""
    session.install("ruff>=0.14")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session):
    """Static types. basedpyright is the pyright that comes as a whole from the package index."""
    install(session, "test", "basedpyright>=1.31")
    session.run("basedpyright", "--pythonpath", f"{session.virtualenv.location}/bin/python")


@nox.session
def checks(session: nox.Session):
    """Types, then all suites, those with torch last, in one environment that is built once; `.ci/run` has them so.

    The slow suite runs without the import hook too, so `tests_plain` is left out.
    """
    session.install("-e", ".[test]")
    for part in (types, tests, tests_slow, parity):
        part(session)


@nox.session
def docs(session: nox.Session):
    """The documentation pages, into site/."""
    install(session, "docs")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def bench(session: nox.Session):
    """The comparison with other programs; takes a quiet machine and some minutes to build llama.cpp."""
    session.install("torch==2.13.0")
    install(session, "bench")
    session.run("python", "benchmarks/peers.py", *session.posargs)
