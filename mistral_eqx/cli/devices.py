"""From the options of the command line to the devices and the strategy."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from ..documents import shown
from ..errors import InputError
from . import processes
from .starting import start_devices


if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.sharding import AbstractMesh, Mesh

    from ..config import MistralConfig
    from ..parallel import Strategy
    from .options import ProcessOptions


# The largest pod has fewer chips.
_MOST_DEVICES = 16_384
# XLA allocates each virtual device in this machine's memory, which takes seconds.
_MOST_VIRTUAL = 1024
_DEVICES_FLAG = "xla_force_host_platform_device_count"


class Devices:
    """The devices that a command runs on; create it before any device is used.

    **Arguments:**

    - `wanted`: the options' texts and numbers.

    **Raises:** `ValueError` if they cannot be read, do not fit together, or the other processes do not come.
    """

    def __init__(self, wanted: ProcessOptions):
        from ..parallel import read_strategy
        from ..parallel.mesh import parse_axes

        mesh, strategy = wanted.mesh, wanted.strategy
        self._axes = None if mesh is None else parse_axes(mesh)
        self._wanted = None if strategy is None else read_strategy(strategy)
        if self._axes is None and self._wanted is not None:
            used = self._wanted.axes()
            if len(used) > 1:
                raise InputError(
                    f"The strategy {strategy!r} splits over the axes {' and '.join(used)}, and no mesh says how many "
                    f"devices each takes; add, for example, --mesh {','.join(f'{axis}=2' for axis in used)}."
                )
        if self._axes is not None and math.prod(self._axes.values()) > _MOST_DEVICES:
            raise InputError(
                f"The mesh {shown(mesh)} takes {shown(math.prod(self._axes.values()))} devices, more than the "
                f"{_MOST_DEVICES} that are possible; make it smaller.",
                key="mesh",
            )
        if not wanted.alone:
            _connect(wanted.coordinator, wanted.num_processes, wanted.process_id, self._axes)

    def place(self, config: MistralConfig) -> tuple[Mesh | None, Strategy, str]:
        """Chooses the mesh and the strategy of a model.

        **Returns:** the mesh or `None`, the strategy, and both in words for the metrics line, or an empty string.
        """
        import jax

        from ..parallel import SINGLE, check_same
        from ..parallel.mesh import make_mesh, show

        axes = self._axes
        if axes is not None and not processes.several():
            _make_virtual(axes, 1, lambda mesh: self._expect_fit(config, mesh))
        start_devices()
        if axes is None and self._wanted is None and not processes.several():
            return None, SINGLE, ""
        if axes is None:
            # One axis over all the devices there are.
            used = ("tp",) if self._wanted is None else self._wanted.axes() or ("tp",)
            axes = {used[0]: jax.device_count()}
            if axes[used[0]] == 1:
                raise InputError(
                    "There is one device, and nothing to split a model over; where virtual devices of the CPU will do, "
                    f"add, for example, --mesh {used[0]}=2."
                )
        check_same("mesh", show(axes))
        mesh = make_mesh(axes)
        strategy = _first_legal(config, mesh) if self._wanted is None else self._wanted
        check_same("strategy", strategy.layout)
        strategy.check(config, mesh)
        together = f" of {jax.process_count()} processes" if processes.several() else ""
        return mesh, strategy, f"{strategy.name} on {show(axes)}{together}"

    def _expect_fit(self, config: MistralConfig, mesh: AbstractMesh):
        """Refuses a mesh over which the model cannot be split, before devices are made."""
        strategy = _first_legal(config, mesh) if self._wanted is None else self._wanted
        strategy.check(config, mesh)


def _connect(coordinator: str | None, num_processes: int | None, process_id: int | None, axes: dict[str, int] | None):
    from ..parallel.mesh import initialize
    from ..parallel.watch import running

    if coordinator == "auto":
        if (num_processes, process_id) != (None, None):
            raise InputError("--coordinator auto finds out --num-processes and --process-id; leave them out.")
    elif None in (coordinator, num_processes, process_id):
        raise InputError(
            "Several processes need --coordinator, --num-processes and --process-id; give all three, or --coordinator "
            "auto where SLURM, Cloud TPU or Open MPI starts them."
        )
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise InputError(
            f"--process-id is {process_id}; with {num_processes} processes it must be from 0 to {num_processes - 1}."
        )
    initialize(None if coordinator == "auto" else coordinator, num_processes, process_id)
    watch = running()
    assert watch is not None  # it is what `initialize` leaves behind
    processes.become(watch.process)
    if axes is not None:
        _make_virtual(axes, watch.processes)
    start_devices()


def _make_virtual(axes: dict[str, int], count: int, check: Callable[[AbstractMesh], object] | None = None):
    """Requests as many virtual CPU devices as the mesh needs; accelerators take precedence.

    A number of devices that the user has set stays.

    **Arguments:**

    - `check`: refuses a mesh that does not fit, before devices are made.
    """
    import jax
    from jax.sharding import AbstractMesh

    if _are_known():
        return  # the mesh checks whether they are enough
    if check is not None:
        check(AbstractMesh(tuple(axes.values()), tuple(axes)))
    if math.prod(axes.values()) > _MOST_VIRTUAL:
        raise InputError(
            f"The mesh takes {math.prod(axes.values())} devices, and this machine's processors would have to stand for "
            f"more than {_MOST_VIRTUAL}; make it smaller, or set JAX_NUM_CPU_DEVICES.",
            key="mesh",
        )
    jax.config.update("jax_num_cpu_devices", -(-math.prod(axes.values()) // count))


def _are_known() -> bool:
    """Whether the user has set the number of devices, or devices are in use."""
    import jax
    from jax._src import xla_bridge  # whether devices are in use, JAX tells in no public place

    asked = jax.config.values["jax_num_cpu_devices"] >= 0
    return asked or _DEVICES_FLAG in os.environ.get("XLA_FLAGS", "") or xla_bridge.backends_are_initialized()


def _first_legal(config: MistralConfig, mesh: Mesh | AbstractMesh) -> Strategy:
    """The first of the named strategies that fits both the mesh and the model."""
    from ..parallel import NAMED

    refused = None
    for strategy in NAMED.values():
        if set(strategy.axes()) <= set(mesh.axis_names):
            try:
                strategy.check(config, mesh)
            except InputError as error:
                refused = refused or error
            else:
                return strategy
    if refused is not None:
        raise refused
    raise InputError(
        f"No strategy has a name and the axes {', '.join(mesh.axis_names)}; call them tp, or kv and rep, or write the "
        f"layout, as in --strategy 'kv_heads@{mesh.axis_names[-1]} hidden@{mesh.axis_names[-1]}'."
    )
