"""Four processes load and save one checkpoint, as four hosts do."""

import filecmp
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.checkpoint import assert_same_weights, edit_json, random_model, tiny, write_noise

from mistral_eqx.checkpoint import load, save
from mistral_eqx.config import MistralConfig


PROCESSES = 4

# 384 MB in bfloat16, of which the table and the head are a third.
LARGE = MistralConfig(
    vocab=32000,
    embed=1024,
    hidden=4096,
    layers=8,
    kv_heads=8,
    q_per_kv=1,
    head_dim=128,
    rope_theta=1e4,
    norm_eps=1e-5,
    max_positions=64,
    windows=(None,) * 8,
)
SMALL = tiny(vocab=96, embed=64, hidden=128, kv_heads=8, q_per_kv=1, head_dim=16)

# What each process runs. It reports what it measured, and the sentence of each error that it met.
CHILD = """
import json, pathlib, resource, sys
tests, folder, port, number = sys.argv[1:]
number, folder = int(number), pathlib.Path(folder)
sys.path.insert(0, tests)
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 4, number)
import numpy as np
import mistral_eqx as mx
from fixtures.checkpoint import counted_reads, counted_writes
from mistral_eqx.checkpoint import open_checkpoint

mesh = jax.make_mesh((8,), ("tp",))

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)

def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)

# Everything but the large load is there before it is measured: the runtime, the connections, the compiled exchange.
small = mx.load(folder / "small", mesh=mesh, strategy=mx.HEADS)
report = {"before": status("VmRSS")}
progress = []
with counted_reads() as seen:
    model = mx.load(folder / "large", mesh=mesh, strategy=mx.HEADS, progress=lambda *now: progress.append(now))
report["peak"] = status("VmHWM")
report["read"] = sum(nbytes for _, nbytes in seen)
arrays = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]
parts = {(id(array), str(part.index)): part.data.nbytes for array in arrays for part in array.addressable_shards}
report["held"] = sum(parts.values())
report["progress"] = progress[-1]
tensors = open_checkpoint(folder / "large").tensors.values()
report["sampled"] = sum(2 * tensor.nbytes // tensor.shape[0] for tensor in tensors)
del arrays

mx.save(small, folder / "saved")
report["written"] = (folder / "saved" / "model.safetensors").exists()
if sys.platform == "linux":
    # From here on the peak is that of saving.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
mx.save(model, folder / "saved-large")
report["saving"] = status("VmHWM") - before
del model
head_dim = mx.load(folder / "small", dtype="bfloat16", mesh=mesh, strategy=mx.HEAD_DIM)
mx.save(head_dim, folder / "saved-bfloat16", format="mistral", max_shard_size="50KB")
replicas = mx.load(folder / "small", mesh=mx.make_mesh("dp=4,tp=2"), strategy=mx.HEADS + "batch@dp")
with counted_writes() as seen:
    mx.save(replicas, folder / ("other-host" if number else "saved-replicas"))
report["wrote"] = sum(seen)
report["occupied"] = refused(lambda: mx.save(small, folder / "saved"))
report["unshared"] = refused(lambda: mx.save(small, folder / ("other-host" if number == 2 else "new")))
damaged = mx.load(folder / "damaged", mesh=mesh, strategy=mx.HEADS)
report["nonfinite"] = refused(lambda: mx.save(damaged, folder / "new"))
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if number == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
report["full"] = refused(lambda: mx.save(small, folder / "new"))
resource.setrlimit(resource.RLIMIT_FSIZE, limits)

def load(path="small", **options):
    return refused(lambda: mx.load(folder / path, **{"mesh": mesh, "strategy": mx.HEADS, **options}))

report["strategy"] = load(strategy=mx.HEAD_DIM if number == 2 else mx.HEADS)
report["mesh"] = load(mesh=jax.make_mesh((8,), ("tp",), devices=jax.devices()[::-1]) if number == 1 else mesh)
report["dtype"] = load(dtype="bfloat16" if number == 3 else None)
report["config"] = load("other-config" if number == 3 else "small")
report["weights"] = load("other-weights" if number == 1 else "small")
report["absent"] = load("absent" if number == 2 else "small")
report["damaged"] = load("damaged", check=True)
report["still"] = load()
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import jax

    folder = tmp_path_factory.mktemp("processes")
    write_noise(folder / "large", LARGE)
    save(random_model(SMALL, jax.random.key(0)), folder / "small")
    save(random_model(SMALL, jax.random.key(1)), folder / "other-weights")
    save(load(folder / "small"), folder / "other-config")
    edit_json(folder / "other-config" / "config.json", rms_norm_eps=1e-6)
    save(load(folder / "small"), folder / "damaged")
    # The last weight of the head, which is the last process's, becomes infinite.
    with open(folder / "damaged" / "model.safetensors", "r+b") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        file.seek(header["lm_head.weight"]["data_offsets"][1] - 4 - header_end(header), os.SEEK_END)
        file.write(b"\0\0\x80\x7f")
    return folder


def header_end(header):
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


@pytest.fixture(scope="module")
def reports(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder), str(port)]
    children = [
        subprocess.Popen(
            [*command, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for number in range(PROCESSES)
    ]
    try:
        outputs = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (_, errors) in zip(children, outputs, strict=True):
        assert child.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.slow
def test_trap_every_host_held_the_whole_array(reports):
    """A process reads what its devices hold, and a thin sample by which copies of the checkpoint are compared."""
    size = 2 * LARGE.parameters
    for report in reports:
        assert report["read"] == report["held"] + report["sampled"]
        assert report["sampled"] < size / 1000
        assert report["held"] < size / 3.9
        assert report["progress"] == [report["held"], report["held"]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_peak_memory_of_one_of_four_processes_is_below_a_third_of_the_checkpoint(reports):
    for report in reports:
        assert 0 < report["held"] < report["peak"] - report["before"] < 2 * LARGE.parameters / 3


def test_trap_device_put_cannot_place_across_hosts(reports, folder):
    """Parts of four processes are one model: put together again, it is the one that they read."""
    assert all(report["written"] for report in reports)
    assert_same_weights(load(folder / "saved"), load(folder / "small"))
    assert_same_weights(load(folder / "saved-bfloat16"), load(folder / "small", dtype="bfloat16"))


def assert_same_files(folder, expected):
    names = sorted(file.name for file in expected.iterdir())
    assert sorted(file.name for file in folder.iterdir()) == names
    assert filecmp.cmpfiles(folder, expected, names, shallow=False) == (names, [], [])


def test_the_files_of_four_processes_are_those_of_one_device(reports, folder, tmp_path):
    """Byte for byte: the parts of each tensor in both orders of rotary pairs, and replicas once."""
    assert_same_files(folder / "saved", folder / "small")
    assert_same_files(folder / "saved-replicas", folder / "small")
    save(load(folder / "small", dtype="bfloat16"), tmp_path / "one", format="mistral", max_shard_size="50KB")
    assert_same_files(folder / "saved-bfloat16", tmp_path / "one")
    assert filecmp.cmp(folder / "saved-large/model.safetensors", folder / "large/model.safetensors", shallow=False)
    # Each host has all of this one, so that the others need no disk that is shared.
    assert [report["wrote"] for report in reports] == [4 * SMALL.parameters, 0, 0, 0]


def test_what_is_refused_leaves_nothing_behind(reports, folder):
    left = {path.name for path in folder.iterdir()}
    assert not {name for name in left if name.startswith(".") or name in ("new", "other-host")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_trap_saving_gathered_whole_tensors(reports):
    """A process that saves holds one shard of one device and a chunk, not a tensor, and not its share of the model."""
    table = 2 * LARGE.vocab * LARGE.embed
    for report in reports:
        assert report["saving"] < table / 2


@pytest.mark.parametrize(
    ("case", "where", "here", "elsewhere"),
    [
        ("strategy", 2, "The strategy is not the same on all processes", None),
        ("mesh", 1, "The mesh is not the same on all processes", None),
        ("dtype", 3, "The dtype is not the same on all processes", None),
        ("config", 3, "The checkpoint is not the same on all processes", None),
        ("weights", 1, "The checkpoint is not the same on all processes", None),
        ("absent", 2, "There is no file, folder or preset", "The checkpoint is not the same on all processes"),
        ("damaged", 3, "'lm_head.weight' holds NaN or infinity", "The content of the checkpoint is not the same"),
        ("occupied", 0, "is not empty; give another path", "The target folder is not the same on all processes"),
        ("unshared", 2, "in which process 0 writes; give the same path on all", "The saved checkpoint is not the same"),
        ("nonfinite", 3, "'lm_head.weight' (the model's 'head') holds NaN", "The saved checkpoint is not the same"),
        ("full", 1, "new/model.safetensors' cannot be written: File too large; f", "The saved checkpoint is not the"),
    ],
)
def test_what_differs_between_processes_is_refused_on_all(case, where, here, elsewhere, reports):
    for number, report in enumerate(reports):
        assert (here if elsewhere is None or number == where else elsewhere) in report[case]


def test_a_refusal_leaves_the_processes_in_step(reports):
    assert [report["still"] for report in reports] == [None] * PROCESSES
