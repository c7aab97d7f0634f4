"""The least time that a chip can take, from what a program computes, moves and exchanges."""

from collections.abc import Iterable

from .chips import Chip
from .report import Exchange, Roofline


# What a message takes from one chip to the next, however short it is.
HOP_SECONDS = 1e-6


def roofline(chip: Chip, flops: float, hbm_bytes: float, exchanges: Iterable[Exchange]) -> Roofline:
    """The least time for each of the three things that a chip does at the same time at best.

    **Arguments:**

    - `chip`: its figures.
    - `flops`, `hbm_bytes`: what one device computes, and moves from and to its memory.
    - `exchanges`: what it exchanges with others.
    """
    interconnect = sum(exchange_seconds(chip, exchange) for exchange in exchanges)
    return Roofline(flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, interconnect)


def exchange_seconds(chip: Chip, exchange: Exchange) -> float:
    """The time of equal exchanges along a ring of devices, in both directions at once.

    In a ring of `n` devices each sends `(n - 1) / n` of what a reduce_scatter takes in, and as much of what an
    all_gather gives out; an all_reduce is one after the other. Each of these passes `n // 2` hops one after another.
    """
    devices = max(exchange.devices, 2)
    lanes = 1 if devices == 2 else 2
    match exchange.kind:
        case "all_reduce":
            passes, moved = 2, 2 * (devices - 1) / devices
        case "all_gather":
            passes, moved = 1, devices - 1
        case "collective_permute":
            passes, moved = 1, 1
        case _:
            passes, moved = 1, (devices - 1) / devices
    hops = 1 if exchange.kind == "collective_permute" else passes * (devices // 2)
    latency = exchange.count * hops * HOP_SECONDS
    return latency + moved * exchange.bytes / (lanes * chip.link_bandwidth)
