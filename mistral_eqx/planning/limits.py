"""Lower bounds on the time of a program, from its operations, memory traffic and exchanges."""

from collections.abc import Iterable

from .chips import Chip
from .report import Exchange, Roofline


# The latency of a message from one chip to the next, typically, by https://jax-ml.github.io/scaling-book/sharding/.
HOP_SECONDS = 1e-6


def roofline(chip: Chip, flops: float, hbm_bytes: float, exchanges: Iterable[Exchange]) -> Roofline:
    """The least times for compute, memory and interconnect, which overlap at best.

    **Arguments:**

    - `chip`: the chip.
    - `flops`: the operations of one device.
    - `hbm_bytes`: the bytes that one device reads from its memory and writes to it.
    - `exchanges`: the exchanges between devices.
    """
    interconnect = sum((exchange_seconds(chip, exchange) for exchange in exchanges), 0.0)
    return Roofline(flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, interconnect)


def exchange_seconds(chip: Chip, exchange: Exchange) -> float:
    """The time of equal exchanges along a ring of devices that sends in both directions.

    In a ring of `n` devices, each device sends `(n - 1) / n` of the input of a reduce_scatter or of the output of an
    all_gather; an all_reduce is a reduce_scatter and an all_gather. Each of these takes `n // 2` hops in sequence.
    """
    devices = max(exchange.devices, 2)
    lanes = 1 if devices == 2 and chip.switched is None else 2
    passes = 2 if exchange.kind == "all_reduce" else 1
    hops = 1 if exchange.kind == "collective_permute" else passes * (devices // 2)
    latency = exchange.count * hops * HOP_SECONDS
    return latency + sent_share(exchange.kind, devices) * exchange.bytes / (lanes * chip.link_bandwidth)


def sent_share(kind: str, devices: int) -> float:
    """The bytes that a device sends along a ring, relative to those that it puts in."""
    match kind:
        case "all_reduce":
            return 2 * (devices - 1) / devices
        case "all_gather":
            return devices - 1.0
        case "collective_permute":
            return 1.0
        case _:
            return (devices - 1) / devices
