"""Imports JAX, which reads its variables of the environment meanwhile; a wrong one ends the program with a sentence."""

import glob
import importlib.util
import os
import sys


def _has_only_a_cpu() -> bool:
    """Whether the extra `tpu` is installed, for plans, on a machine that has neither a TPU nor JAX for a GPU."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*")
    found = [importlib.util.find_spec(name) is not None for name in ("libtpu", "jax_plugins")]
    return not chips and found == [True, False]


# Otherwise libtpu looks for a TPU, and prints errors since it finds none.
if "JAX_PLATFORMS" not in os.environ and _has_only_a_cpu():
    os.environ["JAX_PLATFORMS"] = "cpu"

try:
    import jax as jax
except ValueError as error:
    given = ", ".join(sorted(name for name in os.environ if name.startswith("JAX_")))
    sys.stderr.write(f"Error: JAX refuses a variable of the environment ({error}); correct it among {given}.\n")
    sys.exit(2)
