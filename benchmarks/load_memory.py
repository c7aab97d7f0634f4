"""How much memory does loading a checkpoint take?

Makes a random bfloat16 checkpoint of 7B-like layers in several files, loads and converts it in processes of their own,
and compares their peak resident memory with the budget:

    load:     1.10 x the loaded weights + the largest tensor + 400 MB of runtime
    convert:  400 MB of runtime + one file of weights (it stays far below: nothing but a few rows is in memory)

    python benchmarks/load_memory.py --layers 6 --json load_memory.json

Needs Linux, which keeps the peak of each process, and room for twice the checkpoint in the temporary folder.
"""

import argparse
import dataclasses
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rounds import in_own_process, peak_bytes, timed, use_cpu

from mistral_eqx.checkpoint import hf, open_checkpoint
from mistral_eqx.checkpoint.names import layer_specs
from mistral_eqx.checkpoint.reader import DTYPES
from mistral_eqx.checkpoint.safetensors import write
from mistral_eqx.presets import PRESETS


RUNTIME = 400 * 10**6


def make_checkpoint(folder: Path, layers: int, shard_bytes: int):
    """Writes random weights, a tensor at a time."""
    config = dataclasses.replace(PRESETS["7b-v0.3"], layers=layers, windows=(None,) * layers)
    dtype = DTYPES["bfloat16"]
    shards: list[list] = [[]]
    size = 0
    for spec in layer_specs(config):
        nbytes = int(np.prod(spec.file_shape(config))) * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += nbytes
    numbers = np.random.default_rng(0)
    # Bits of small positive numbers: drawing normal ones would take longer than everything else here.
    noise = numbers.integers(0x3C00, 0x3D00, size=2**20, dtype=np.uint16)

    def random(shape):
        for start in range(0, shape[0], 256):
            part = (min(256, shape[0] - start), *shape[1:])
            yield np.resize(np.roll(noise, int(numbers.integers(2**20))), part).view(dtype)

    placed = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shapes = [(spec.name("hf"), spec.file_shape(config)) for spec in shard]
        write(folder / name, [(tensor, shape, dtype, random(shape)) for tensor, shape in shapes])
        placed |= {spec.name("hf"): name for spec in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(hf.write_config(config)))


def run(action: str, source: Path, dtype: str | None, target: Path) -> dict[str, Any]:
    """One measurement, in the process that calls this."""
    import equinox as eqx
    import jax

    from mistral_eqx.checkpoint import convert, load

    weights = 0
    if action == "load":
        seconds, model = timed(lambda: load(source, dtype=dtype))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    elif action == "convert":
        seconds, _ = timed(lambda: convert(source, target, format="mistral", dtype=dtype))
    else:
        seconds, _ = timed(jax.devices)
    return {"peak": peak_bytes(), "weights": weights, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="6 layers make a checkpoint of 3.2 GB")
    parser.add_argument("--folder", type=Path, default=None, help="where to put it; the system's temporary folder")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    arguments = parser.parse_args()
    # On the CPU the weights themselves are resident memory, which makes this the strictest case.
    use_cpu()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="load-memory-"))
    try:
        source = folder / "hf"
        source.mkdir()
        seconds, _ = timed(make_checkpoint, source, arguments.layers, 10**9)
        tensors = open_checkpoint(source).tensors
        stored = sum(tensor.nbytes for tensor in tensors.values())
        largest = max(int(np.prod(tensor.shape)) for tensor in tensors.values())
        print(f"made {stored / 1e9:.2f} GB in {seconds:.0f} s", file=sys.stderr)
        report = {"checkpoint_bytes": stored, "machine": platform.processor() or platform.machine(), "runs": []}
        report["runtime_alone"] = in_own_process(run, "nothing", source, None, folder)["peak"]
        for action, dtype in (("load", None), ("load", "float16"), ("load", "float32"), ("convert", None)):
            found = in_own_process(run, action, source, dtype, folder / "converted")
            itemsize = {None: 2, "float16": 2, "float32": 4}[dtype]
            shard = 0 if action == "load" else 10**9
            bound = 1.10 * found["weights"] + RUNTIME + (largest * itemsize if action == "load" else shard)
            found |= {"action": action, "dtype": dtype or "as stored", "bound": int(bound)}
            found["within"] = found["peak"] <= bound
            report["runs"].append(found)
            shutil.rmtree(folder / "converted", ignore_errors=True)
            print(
                f"{action:8} {found['dtype']:10} weights {found['weights'] / 1e9:5.2f} GB   "
                f"peak {found['peak'] / 1e9:5.2f} GB   bound {bound / 1e9:5.2f} GB   {found['seconds']:5.1f} s   "
                f"{'within' if found['within'] else 'ABOVE THE BOUND'}"
            )
        print(json.dumps(report))
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not all(found["within"] for found in report["runs"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
