"""Imports JAX, which reads its variables of the environment meanwhile; a wrong one ends the program with a sentence."""

import os
import sys


try:
    import jax as jax
except ValueError as error:
    given = ", ".join(sorted(name for name in os.environ if name.startswith("JAX_")))
    sys.stderr.write(f"Error: JAX refuses a variable of the environment ({error}); correct it among {given}.\n")
    sys.exit(2)
