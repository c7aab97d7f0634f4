"""What the chips can do that a plan can be made for."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of a chip that bound how fast a program can be, from its maker's page.

    **Attributes:**

    - `name`: such as `"v4"`.
    - `flops`: operations a second on bfloat16.
    - `hbm_bytes`: the memory that a program can have. This is what libtpu 0.0.42 tells a program that asks for too
        much, a little less than the page says: the rest is its own.
    - `hbm_bandwidth`: bytes a second between that memory and the chip.
    - `link_bandwidth`: bytes a second over one link to a neighbour, in one direction.
    - `links`: how many neighbours a chip has.
    - `source`: the page.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    links: int
    source: str


_GIB = 2**30
_PAGES = "https://docs.cloud.google.com/tpu/docs/"

# The pages of v5e, v5p and v6e give the bandwidth of all links of a chip in both directions, 400, 1200 and 800 GB/s;
# that of v4 gives none, and earlier versions of these pages 2400, 1600 and 4800 Gbit/s in one direction for v4, v5e
# and v5p: 50 GB/s for each of six links of a v4.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip("v4", 275e12, int(30.75 * _GIB), 1200e9, 50e9, 6, _PAGES + "v4"),
            Chip("v5e", 197e12, int(15.75 * _GIB), 819e9, 50e9, 4, _PAGES + "v5e"),
            Chip("v5p", 459e12, int(95.74 * _GIB), 2765e9, 100e9, 6, _PAGES + "v5p"),
            Chip("v6e", 918e12, int(31.25 * _GIB), 1638e9, 100e9, 4, _PAGES + "v6e"),
        )
    }
)
