"""Starts JAX's devices, which variables of the environment can prevent, and XLA would end this process for."""

import os
import subprocess
import sys

from ..documents import shown
from ..errors import InputError


_FLAGS = "XLA_FLAGS"


def start_devices():
    """Makes JAX's devices, if there are none yet.

    **Raises:** `InputError` that names the variable, if JAX or XLA cannot use what the environment says.
    """
    import jax
    from jax._src import xla_bridge  # whether devices are in use, JAX tells in no public place

    flags = os.environ.get(_FLAGS, "").strip()
    if flags and not xla_bridge.backends_are_initialized():
        _expect_flags(flags)
    try:
        jax.devices()
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        which = f"the platforms {shown(platforms)} of JAX_PLATFORMS" if platforms else "its devices"
        raise InputError(
            f"JAX cannot start {which} ({' '.join(str(error).split())[:200]}); correct the variables of the "
            "environment, as by JAX_PLATFORMS=cpu.",
            key="JAX_PLATFORMS",
        ) from error


def _expect_flags(flags: str):
    """XLA ends the process at a flag that it does not know, so another process tries them."""
    attempt = "import jaxlib.xla_client; jaxlib.xla_client.make_cpu_client()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", attempt], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if _FLAGS in line] or [f"exit code {done.returncode}"]
        reason = lines[0].rpartition("] ")[2]
        raise InputError(
            f"XLA refuses the variable {_FLAGS}={shown(flags)} ({reason[:200]}); correct it, or unset it.", key=_FLAGS
        )
