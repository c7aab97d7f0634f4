import os
import signal


# A shell's background jobs ignore ctrl-C, and programs that they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests never compile for, or wait for, a device that this machine happens to have.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.random as jr
import pytest


jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Of the cases of a test at most one is slow, and none if others run by default. Further ones are `long`.

    What is `long` is `slow` too.
    """
    slow = {item for item in items if item.get_closest_marker("slow") or item.get_closest_marker("long")}
    seen = {_test_of(item) for item in items if item not in slow}
    for item in items:
        if item not in slow:
            continue
        item.add_marker("slow")
        if _test_of(item) in seen:
            item.add_marker("long")
        elif not item.get_closest_marker("long"):
            seen.add(_test_of(item))


def _test_of(item: pytest.Item) -> str:
    return item.nodeid.split("[")[0]


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Lets go of a file's compiled programs: each is mapped into memory, and a process may have so many mappings."""
    yield
    jax.clear_caches()


@pytest.fixture
def getkey():
    """Gives a fresh key at each call, the same ones in each run."""
    keys = iter(jr.split(jr.key(0), 1000))
    return lambda: next(keys)


@pytest.fixture
def without_kernels(monkeypatch):
    """Loads and quantizes weights as where the C++ kernels are missing, so that no product rounds activations."""
    from mistral_eqx.nn.kernels import native

    monkeypatch.setattr(native, "instructions", lambda: None)


@pytest.fixture(scope="session")
def smollm2_path():
    """The GGUF file of the default model, fetched if this machine does not have it yet."""
    from mistral_eqx.checkpoint import locate

    return locate("smollm2-135m")
