"""Generates on several hosts together: differs from tensor_parallel.py in that each host runs this script.

    python examples/multi_host.py                                 two processes here play the hosts
    python examples/multi_host.py smollm2-135m 10.0.0.1:8476 2 0  the first of two real ones, with that address
    python examples/multi_host.py smollm2-135m 10.0.0.1:8476 2 1  the second

Prompts are split over the hosts, and the model over the devices of each. Only the first process prints.
"""

import os
import socket
import subprocess
import sys

import jax

import mistral_eqx as mx


PROMPTS = ("The capital of France is", "Water boils at", "The opposite of cold is", "A week has")


def host(name, coordinator, processes, process):
    """What each host does; before `initialize` no device may be used."""
    mx.parallel.initialize(coordinator, int(processes), int(process))

    # The first axis runs over the hosts, the last over devices that are close to each other.
    mesh = mx.make_mesh({"dp": jax.process_count(), "tp": jax.local_device_count()})
    # The default model has three key/value heads, which two devices cannot share; the entries of a head they can.
    model = mx.load(name, mesh=mesh, strategy=mx.HEAD_DIM + "batch@dp")

    tokenizer = mx.load_tokenizer(name)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    out = mx.generate(model, prompts, max_new_tokens=12, tokenizer=tokenizer)
    # Every process has the tokens of all.
    if jax.process_index() == 0:
        print(f"{jax.device_count()} devices of {jax.process_count()} processes")
        for prompt, text in zip(PROMPTS, out.texts, strict=True):
            print(f"{prompt}{text!r}")


def main(name="smollm2-135m", processes=2):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, __file__, name, f"localhost:{port}", str(processes)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    started = [
        subprocess.Popen([*command, str(process)], env=environment, stdout=subprocess.PIPE, text=True)
        for process in range(processes)
    ]
    printed = [process.communicate()[0] for process in started]
    # On CPUs the processes are connected by gloo, which says so.
    print("\n".join(line for line in printed[0].splitlines() if "peer ranks" not in line))
    if any(process.returncode for process in started):
        sys.exit("A process has failed.")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        host(*sys.argv[1:])
    else:
        main(*sys.argv[1:])
