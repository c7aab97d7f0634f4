"""The chips that a plan can be made for."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Chip:
    """The numbers of a chip that bound the speed of a program, from its data sheet.

    **Attributes:**

    - `name`: the name, such as `"v4"`.
    - `flops`: operations per second in bfloat16.
    - `hbm_bytes`: the memory of a program: for TPUs the limit that libtpu 0.0.42 reports to a program that is too
        large, which is less than in the data sheet, because libtpu keeps the rest; for GPUs that of the data sheet.
    - `hbm_bandwidth`: bytes per second between this memory and the chip.
    - `link_bandwidth`: bytes per second over one link to a neighbour, in one direction.
    - `links`: the number of neighbours of a chip.
    - `switched`: for GPUs, the number that one switch connects. Each then has two links, in as many directions of a
        ring, with half of what it can send; between two GPUs there are both. `None` for a torus of TPUs.
    - `source`: the data sheet.
    - `devices`: the number of devices that JAX has of a chip. All other numbers are those of one device, which has a
        share of each link.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    links: int
    source: str
    switched: int | None = None
    devices: int = 1


_GIB = 2**30
_GB = 10**9
_PAGES = "https://docs.cloud.google.com/tpu/docs/"
_SHEETS = "https://www.nvidia.com/en-us/data-center/"

# Links: v5e, v5p and v6e have 400, 1200 and 800 GB/s per chip, over all links and both directions. For v4 an earlier
# page has 2400 Gbit/s in one direction: 50 GB/s for each of six links.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip("v4", 275e12, int(30.75 * _GIB), 1200e9, 50e9, 6, _PAGES + "v4"),
            Chip("v5e", 197e12, int(15.75 * _GIB), 819e9, 50e9, 4, _PAGES + "v5e"),
            Chip("v5p", 459e12, int(95.74 * _GIB), 2765e9, 100e9, 6, _PAGES + "v5p"),
            Chip("v6e", 918e12, int(31.25 * _GIB), 1638e9, 100e9, 4, _PAGES + "v6e"),
            # A chip has two devices, 2307 TFLOP/s, 192 GiB, 7380 GB/s, and 1200 GB/s over links.
            Chip("tpu7x", 2307e12 / 2, 96 * _GIB, 7380e9 / 2, 50e9, 6, _PAGES + "tpu7x", devices=2),
            # Dense operations; NVLink has 600, 900, 900 and 1800 GB/s per GPU, over both directions.
            Chip("A100", 312e12, 80 * _GB, 2039e9, 150e9, 2, _SHEETS + "a100/", 8),
            Chip("H100", 989e12, 80 * _GB, 3350e9, 225e9, 2, _SHEETS + "h100/", 8),
            Chip("H200", 989e12, 141 * _GB, 4800e9, 225e9, 2, _SHEETS + "h200/", 8),
            Chip("B200", 2250e12, 180 * _GB, 8000e9, 450e9, 2, _SHEETS + "dgx-b200/", 8),
        )
    }
)
