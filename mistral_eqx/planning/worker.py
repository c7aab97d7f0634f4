"""Compiles the programs of a plan in a separate process, so that JAX's settings and libtpu do not affect the caller.

The process reads the pickled job from stdin, and writes the phases as JSON to stdout; output of libraries goes to
stderr.
"""

import dataclasses
import json
import os
import pickle
import re
import sys
import time
from typing import Any

import jax

from ..errors import InputError
from .hlo import Program, kernel_flops
from .programs import Job, Uncompiled, programs
from .report import Exchange, Memory
from .stablehlo import products, written


_GIB = 2**30
_TOO_LARGE = re.compile(r"\((\d+(?:\.\d+)?)([KMG]?)\) exceeds available HBM")


def main():
    """Reads a job, and writes its phases or an error message."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job: Job = pickle.load(sys.stdin.buffer)
    try:
        devices = jax.devices() if job.topology is None else _topology(job.topology)
        result: dict[str, Any] = {"phases": [_measure(program, job) for program in programs(job, devices)]}
    except ValueError as error:
        result = {"refused": str(error)}
    json.dump(result, answer)
    answer.close()


def _topology(name: str) -> list[Any]:
    from jax.experimental import topologies

    chip, _, sides = name.partition(":")
    options: dict[str, Any] = {}
    if chip == "v4":
        # By default each of the two cores of a chip is a device.
        options["chip_config_name"] = "megacore"
    if set(sides.split("x")) == {"1"}:
        # The default host has several chips.
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise InputError(f"libtpu refuses the topology {name!r}: {error}") from error


def _measure(program: Uncompiled, job: Job) -> dict[str, Any]:
    start = time.perf_counter()
    lowered = program.lower("cpu" if job.topology is None else "tpu")
    fields = {"name": program.name, "runs": program.runs, "tokens": program.tokens}
    exchanges = written(lowered)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _TOO_LARGE.search(str(error))
        if found is None:
            raise
        units = {"": 1, "K": 2**10, "M": 2**20, "G": _GIB}
        total = int(float(found[1]) * units[found[2]])
        memory = dataclasses.replace(program.memory, temporary=max(total - program.memory.total, 0))
        compiled = None
        costs: dict[str, Any] = {"flops": 0.0, "hbm_bytes": 0, "once_bytes": 0, "exchanges": []}
        refused = str(error).partition("\n")[0]
    else:
        memory, costs, refused = _memory(program, compiled), _costs(program, compiled, lowered), None
    return {
        **fields,
        **costs,
        "memory": dataclasses.asdict(memory),
        "written": _entries(exchanges),
        "compile_seconds": time.perf_counter() - start,
        "roofline": None,
        "refused": refused,
    }


def _memory(program: Uncompiled, compiled: jax.stages.Compiled) -> Memory:
    sizes: Any = compiled.memory_analysis()
    # Donated buffers count as arguments.
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    known = program.memory
    other = sizes.argument_size_in_bytes + results - known.weights - known.cache - known.optimizer
    if not sizes.host_argument_size_in_bytes:
        # On a CPU, host memory is device memory.
        other -= known.host
    # Gradients are temporary buffers of a known size.
    gradients = min(known.gradients, sizes.temp_size_in_bytes)
    return dataclasses.replace(
        known,
        gradients=gradients,
        other=other,
        temporary=sizes.temp_size_in_bytes - gradients,
        code=sizes.generated_code_size_in_bytes,
    )


def _costs(program: Uncompiled, compiled: jax.stages.Compiled, lowered: jax.stages.Lowered) -> dict[str, Any]:
    hlo = compiled.as_text() or ""
    text = Program(hlo)
    body = text.loop_body() if program.loops else text.entry
    counted: Any = compiled.cost_analysis()
    hbm_bytes = text.traffic(body)
    # XLA counts a loop body once: right for one decoding step, wrong for a training step.
    flops = products(lowered) if program.name == "step" else max(counted.get("flops", 0.0), 0.0) + kernel_flops(hlo)
    return {
        "flops": flops,
        "hbm_bytes": hbm_bytes,
        "once_bytes": text.traffic(text.entry) - hbm_bytes if program.loops else 0,
        "exchanges": _entries(text.exchanges(body)),
    }


def _entries(exchanges: list[Exchange]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(exchange) for exchange in exchanges]


if __name__ == "__main__":
    main()
