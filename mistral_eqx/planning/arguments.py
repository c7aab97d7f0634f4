"""The arguments that plans and rankings share: a model's name, its lengths and the topology."""

import math
import re
from typing import Annotated, Literal

from annotated_types import Ge, Le

from ..checks import Count, checked
from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from ..generation.reading import prompt_width
from ..presets import PRESETS
from .chips import CHIPS, Chip


_TOPOLOGY = re.compile(r"(\w+):([0-9]+(?:x[0-9]+)*)")
# Above the size of the largest pod.
_MOST_DEVICES = 16_384
# Each virtual device takes memory of this machine.
VirtualDevices = Annotated[int, Ge(1), Le(4096)]
DTypes = Literal["float32", "bfloat16", "float16"]


def cache_slots(config: MistralConfig, kv_seq: int | None) -> int:
    """The number of slots of each row in the cache, checked; 4096, or the model's context, unless given."""
    slots: int = checked(min(4096, config.max_positions) if kv_seq is None else kv_seq, Count, "kv_seq")
    if slots > config.max_positions:
        raise InputError(
            f"kv_seq is {slots} and the model's context is {config.max_positions} tokens; take a shorter kv_seq."
        )
    return slots


def lengths_of(config: MistralConfig, prompt: int | None, kv_seq: int | None) -> tuple[int, int]:
    """The tokens of a prompt and the slots of the cache, checked, or those that `plan` takes unless they are given."""
    slots = cache_slots(config, kv_seq)
    length: int = checked(min(512, -(-slots // 2)) if prompt is None else prompt, Count, "prompt")
    if slots < prompt_width(length):
        raise InputError(
            f"A prompt of {length} tokens is padded to {prompt_width(length)} and does not fit into a cache of "
            f"{slots} slots; take a longer kv_seq or a shorter prompt."
        )
    return length, slots


def named(model: MistralConfig | str) -> tuple[MistralConfig, str]:
    """The config of a preset, or the config itself, and its name in a report."""
    if isinstance(model, MistralConfig):
        return model, "config"
    if not isinstance(model, str) or model not in PRESETS:
        raise InputError(f"There is no preset {shown(model)}; the presets are {', '.join(PRESETS)}.")
    return PRESETS[model], model


def count_devices(topology: str | None, devices: int | None) -> int:
    """The number of devices of a topology, or of virtual devices.

    **Raises:** `ValueError` unless exactly one of the two is given, and as [`mistral_eqx.plan`][] says.
    """
    if topology is not None:
        if devices is not None:
            raise InputError(
                f"The topology {shown(topology)} fixes the number of devices; leave out devices={shown(devices)}."
            )
        sides, chip = _sides(topology), CHIPS.get(topology.partition(":")[0])
        return math.prod(sides) * (1 if chip is None else chip.devices)
    if devices is None:
        raise InputError(
            "There are no devices to plan for; give a topology such as 'v4:2x2x4', or a number of virtual devices."
        )
    return checked(devices, VirtualDevices, "devices")


def chip_of(topology: str) -> Chip:
    """The chip of a topology.

    **Raises:** `ValueError` if it is unknown, or connected along another number of sides.
    """
    chip, sides = CHIPS.get(topology.partition(":")[0]), _sides(topology)
    if chip is None:
        raise InputError(f"The chip of the topology {topology!r} is not known; the chips are {', '.join(CHIPS)}.")
    if len(sides) != chip.links // 2:
        raise InputError(
            f"Chips {chip.name} are connected along {chip.links // 2} sides, and {topology!r} has {len(sides)}; write, "
            f"for example, '{chip.name}:{'x'.join('2' * (chip.links // 2))}'."
        )
    if chip.switched is not None and sides[0] > chip.switched:
        raise InputError(
            f"The topology {topology!r} has {sides[0]} GPUs, and a switch connects {chip.switched}; there are no "
            f"figures of the network between servers, so take {chip.switched} at most."
        )
    return chip


def _sides(topology: str) -> list[int]:
    # int() refuses thousands of digits.
    match = _TOPOLOGY.fullmatch(topology) if isinstance(topology, str) and len(topology) < 100 else None
    if match is None:
        raise InputError(
            f"The topology {shown(topology)} must be a chip and the number of chips along each side, such as "
            "'v4:2x2x4' or 'v5e:4x4'."
        )
    sides = [int(side) for side in match[2].split("x")]
    if not 1 <= math.prod(sides) <= _MOST_DEVICES:
        raise InputError(
            f"The topology {shown(topology)} has {shown(math.prod(sides))} chips; it must have at least 1 along each "
            f"side, and {_MOST_DEVICES} at most."
        )
    return sides
