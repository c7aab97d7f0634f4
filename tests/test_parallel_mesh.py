import jax
import jaxtyping
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from mistral_eqx.parallel import initialize, make_mesh, mesh as mesh_module
from mistral_eqx.parallel.mesh import parse_axes, show


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ("tp=4", {"tp": 4}),
        ("dp=2,tp=2", {"dp": 2, "tp": 2}),
        (" dp=2, tp=2 ", {"dp": 2, "tp": 2}),
        ("kv=2 rep=1", {"kv": 2, "rep": 1}),
        ({"kv": 2, "rep": 2}, {"kv": 2, "rep": 2}),
    ],
)
def test_a_mesh_has_the_axes_that_it_was_given_in_their_order(axes, expected):
    mesh = make_mesh(axes)
    assert dict(mesh.shape) == expected
    assert mesh.axis_names == tuple(expected)
    assert set(mesh.axis_types) == {AxisType.Auto}
    # The last axis runs over neighbours.
    assert list(mesh.devices.flat) == jax.devices()[: mesh.size]
    assert parse_axes(show(expected)) == expected


def test_devices_can_be_chosen():
    chosen = jax.devices()[1:4]
    assert list(make_mesh("tp=2", chosen).devices.flat) == chosen[:2]
    with pytest.raises(ValueError, match="takes 4 devices and there are 3"):
        make_mesh("tp=4", chosen)


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ("tp", "must name its axes and their sizes"),
        ("", "must name its axes and their sizes"),
        ("tp=two", "must name its axes and their sizes"),
        ("tp=-2", "must name its axes and their sizes"),
        ("tp=2;dp=2", "must name its axes and their sizes"),
        ("tp=2,tp=2", "names the axis 'tp' twice"),
        ("tp=0", "axis 'tp' is 0; it must be at least 1"),
        ({"tp": -1}, "axis 'tp' is -1; it must be at least 1"),
        ({}, "has no axes"),
        ("tp=" + "9" * 30, "axis 'tp' is 9+; it must be at most 1048576"),
        ("tp=" + "9" * 6000, "axis 'tp' is 9+; it must be at most 1048576"),
        ({"tp": 10**5000}, "axis 'tp' is a very large int; it must be at most 1048576"),
        ("a=1048576,b=1048576", "takes 1099511627776 devices, more than 1048576"),
        ({"tp": 2.5}, "axis 'tp' is 2.5; it must be a whole number"),
        ({"tp": True}, "axis 'tp' is True; it must be a whole number"),
        (["tp"], r"The mesh is \['tp'\]; give its axes"),
        (None, "The mesh is None; give its axes"),
    ],
)
def test_a_wrong_mesh_is_refused_in_a_sentence(axes, sentence, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence) as error:
        make_mesh(axes)
    assert str(error.value).endswith(".")


def test_a_mesh_larger_than_the_devices_says_how_to_get_more():
    expected = f"takes 512 devices and there are {jax.device_count()}; .* JAX_NUM_CPU_DEVICES=512\\."
    with pytest.raises(ValueError, match=expected):
        make_mesh("dp=2,tp=256")


def test_sides_that_the_torus_lacks_are_cut_out_of_longer_ones(monkeypatch):
    def make(*args, **options):
        raise NotImplementedError

    asked = {}

    def create(shape, devices, *, allow_split_physical_axes):
        asked["split"] = allow_split_physical_axes
        return np.array(devices).reshape(shape)

    monkeypatch.setattr(jax, "make_mesh", make)
    monkeypatch.setattr(mesh_utils, "create_device_mesh", create)
    mesh = make_mesh("a=2,b=2")
    assert asked == {"split": True}
    assert dict(mesh.shape) == {"a": 2, "b": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}


class Device:
    """Stands for a device of some process."""

    platform = "cpu"

    def __init__(self, process_index):
        self.process_index = process_index


def test_a_mesh_that_leaves_a_process_out_is_refused(monkeypatch):
    devices = [Device(process) for process in (0, 0, 1, 1, 2, 2)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: len(devices))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="takes 4 of 6 devices, and none of process 2; take all devices"):
        make_mesh("tp=4")
    with pytest.raises(ValueError, match="JAX_NUM_CPU_DEVICES=3 on each process"):
        make_mesh("tp=8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("localhost:9000",), "There is coordinator without num_processes and process_id; give all three"),
        ((None, 2, 0), "There is num_processes and process_id without coordinator"),
        (("localhost:9000", 2, 2), "process_id is 2; with 2 processes it must be from 0 to 1"),
        (("localhost:9000", 2, -1), "process_id is -1"),
        (("localhost:9000", 0, 0), "num_processes is 0"),
        (("localhost", 2, 0), "must be the host of process 0 and a free port there"),
        (("localhost:99999", 2, 0), "must be the host of process 0 and a free port there"),
        ((), "Neither SLURM nor Cloud TPU nor Open MPI started this process"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(arguments, sentence, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match=sentence):
        initialize(*arguments)


def test_processes_cannot_be_connected_once_devices_are_in_use():
    jax.devices()
    with pytest.raises(ValueError, match="Devices are in use already"):
        initialize("localhost:9000", 2, 0)


def test_slurm_is_asked_where_nothing_is_given(monkeypatch):
    step = {"JOB_ID": "4096", "STEP_NODELIST": "node[07-10]", "NTASKS": "4", "PROCID": "2", "LOCALID": "0"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    coordinator, processes, process = mesh_module._process_arguments(None, None, None, 60.0)
    assert coordinator.startswith("node07:")
    assert (processes, process) == (4, 2)
