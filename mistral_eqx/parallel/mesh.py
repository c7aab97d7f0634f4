"""Meshes of devices, on one host or several."""

import atexit
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
from annotated_types import Ge, Le
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ..checks import Count, Positive, checked
from ..documents import shown
from ..errors import InputError
from .watch import address, meet, run


_AXIS = re.compile(r"([a-z_0-9]+)=([0-9]+)")

# More devices than any machine has. The limit keeps loops over a number of devices short.
MOST_DEVICES = 2**20

# JAX ends a process after this many seconds without a heartbeat of another one, if our watch has not ended it.
_HEARTBEAT = 40


def parse_axes(axes: str | Mapping[str, int]) -> dict[str, int]:
    """Names and sizes of a mesh's axes.

    **Arguments:**

    - `axes`: such as `"dp=2,tp=4"` or `{"dp": 2, "tp": 4}`.

    **Returns:** the size of each axis, in the order given.

    **Raises:** `ValueError` if the text has another form, an axis is named twice, or a size is not positive.
    """
    if isinstance(axes, str):
        sizes = {}
        for entry in re.split(r"[\s,]+", axes.strip(" \t,")):
            match = _AXIS.fullmatch(entry)
            if match is None:
                raise InputError(
                    f"The mesh {axes!r} must name its axes and their sizes, such as 'tp=8' or 'dp=2,tp=4'."
                )
            if match[1] in sizes:
                raise InputError(f"The mesh {axes!r} names the axis {match[1]!r} twice; keep one.")
            # A size of 20 digits is refused below; `int` would raise for thousands of digits.
            sizes[match[1]] = int(match[2][:20])
    elif isinstance(axes, Mapping):
        sizes = dict(axes)
    else:
        raise InputError(f"The mesh is {shown(axes)}; give its axes and their sizes, such as 'tp=8' or {{'tp': 8}}.")
    if not sizes:
        raise InputError("The mesh has no axes; give at least one, such as {'tp': 8}.")
    for name, size in sizes.items():
        checked(name, str, "The name of a mesh's axis")
        sizes[name] = checked(
            size, Annotated[int, Ge(1), Le(MOST_DEVICES)], f"The size of the mesh's axis {shown(name)}"
        )
    if (count := math.prod(sizes.values())) > MOST_DEVICES:
        raise InputError(f"The mesh {show(sizes)} takes {count} devices, more than {MOST_DEVICES}; make it smaller.")
    return sizes


def make_mesh(axes: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices along named axes.

    The last axis runs over the devices that are closest to each other; with several processes, the first axis runs
    across processes. On TPU, the arrangement follows the torus of the chips, as that of `jax.make_mesh` does.

    **Arguments:**

    - `axes`: names and sizes of the axes, such as `"tp=8"`, `"dp=2,tp=4"` or `{"kv": 8, "rep": 2}`.
    - `devices`: the devices to use, by default all; if there are more than the mesh holds, it has the first ones.

    **Returns:** the mesh, whose axes are `Auto`.

    **Raises:** `ValueError` if the axes are wrong, there are not enough devices, or the mesh has no device of one of
    several processes.
    """
    sizes = parse_axes(axes)
    count = math.prod(sizes.values())
    devices = jax.devices() if devices is None else list(devices)
    if count > len(devices):
        raise InputError(
            f"The mesh {show(sizes)} takes {count} devices and there are {len(devices)}; make it smaller"
            f"{_virtual(devices, count)}."
        )
    devices = devices[:count]
    processes = {device.process_index for device in jax.devices()}
    missing = processes - {device.process_index for device in devices}
    if missing and len(processes) > 1:
        raise InputError(
            f"The mesh {show(sizes)} takes {count} of {jax.device_count()} devices, and none of process "
            f"{', '.join(map(str, sorted(missing)))}; take all devices, or start fewer processes."
        )
    names, shape, auto = tuple(sizes), tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(shape, names, axis_types=auto, devices=devices)
    except NotImplementedError:
        # The torus has no sides of these lengths, but longer sides can be split.
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(arranged, names, axis_types=auto)


def show(axes: Mapping[str, int]) -> str:
    """The axes as text, such as `"dp=2,tp=4"`."""
    return ",".join(f"{name}={size}" for name, size in axes.items())


def _virtual(devices: Sequence[Any], count: int) -> str:
    """The remedy for a machine without accelerators."""
    if any(device.platform != "cpu" for device in devices) or count > 1024:
        return ""
    each = -(-count // jax.process_count())
    where = "" if jax.process_count() == 1 else " on each process"
    return f", or get virtual devices of the CPU by setting JAX_NUM_CPU_DEVICES={each}{where}"


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 60.0,
    local_device_ids: Sequence[int] | None = None,
):
    """Connects several processes, on one host or several, so that each can use the devices of all.

    Every process calls it once, before it uses a device. From then on, a process that fails or dies ends the others.
    Without arguments, JAX detects them from SLURM, Cloud TPU or Open MPI.

    **Arguments:**

    - `coordinator`: the host of process 0 and a free port there, `"host:port"`; the same on all processes.
    - `num_processes`: the number of processes.
    - `process_id`: the number of this process, from 0.
    - `timeout`: how many seconds to wait for the other processes.
    - `local_device_ids`: which of this host's accelerators belong to this process, by default all. Under SLURM and Open
        MPI the default is one, whose id is the number of the task on its host.

    **Raises:** `ValueError` if a device is in use already, the processes are connected already, the arguments do not
    fit together, or a process does not connect in time.
    """
    # JAX has no public function for whether devices are in use, nor for what started this process.
    from jax._src import xla_bridge

    if jax.distributed.is_initialized():
        raise InputError("The processes are connected already; call mistral_eqx.parallel.initialize once.")
    timeout = checked(timeout, Positive, "timeout")
    coordinator, num_processes, process_id = _process_arguments(coordinator, num_processes, process_id, timeout)
    if xla_bridge.backends_are_initialized():
        raise InputError(
            "Devices are in use already; call mistral_eqx.parallel.initialize before the first array is made."
        )
    watch = meet(coordinator, num_processes, process_id, timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids,
            initialization_timeout=math.ceil(timeout),
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except RuntimeError as error:
        raise InputError(f"JAX could not connect the processes at {coordinator!r}: {error}") from error
    run(watch)
    # The last registered function runs first: before JAX waits for the other processes.
    atexit.register(watch.end)


def _process_arguments(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> tuple[str, int, int]:
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, math.ceil(timeout))
        coordinator, num_processes, process_id, _ = found
        if coordinator is None or num_processes is None or process_id is None:
            raise InputError(
                "Neither SLURM nor Cloud TPU nor Open MPI started this process, so its process_id is unknown; give "
                "coordinator, num_processes and process_id."
            )
    if coordinator is None or num_processes is None or process_id is None:
        present = [name for name in given if name not in missing]
        raise InputError(
            f"There is {' and '.join(present)} without {' and '.join(missing)}; give all three, or "
            "none where SLURM, Cloud TPU or Open MPI starts the processes."
        )
    address(coordinator)
    count: int = checked(num_processes, Count, "num_processes")
    number: int = checked(process_id, int, "process_id")
    if not 0 <= number < count:
        raise InputError(f"process_id is {number}; with {count} processes it must be from 0 to {count - 1}.")
    return coordinator, count, number
