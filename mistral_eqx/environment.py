"""Imports JAX, which reads its variables of the environment meanwhile, and refuses one with a traceback.

Where this package is the program that runs, that is a sentence and exit code 2 here.
"""

import os
import sys

from . import interrupts


if interrupts.is_program():
    try:
        import jax as jax
    except ValueError as error:
        given = ", ".join(sorted(name for name in os.environ if name.startswith("JAX_")))
        sys.stderr.write(f"Error: JAX refuses a variable of the environment ({error}); correct it among {given}.\n")
        sys.exit(2)
