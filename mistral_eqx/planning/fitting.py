"""The smallest number of chips that hold a model and its cache, from shapes: nothing is compiled."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jax.sharding import AbstractMesh

from ..checks import CacheDType, Count, checked
from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from ..generation.reading import CHUNK
from ..nn.slots import slots_for
from ..parallel import SINGLE, Choice, Strategy, strategies
from ..quant import Recipe
from .arguments import DTypes, cache_slots, named
from .chips import CHIPS, Chip
from .shapes import bytes_by_format, cache_shapes, device_bytes, split_shapes, whole_shapes


# The rest is for temporary buffers and the program.
SHARE = 0.9
_MOST_CHIPS = 1024


@dataclasses.dataclass(frozen=True)
class Holding:
    """The smallest number of chips that hold a model.

    **Attributes:**

    - `model`: the preset's name, or `"config"`.
    - `chip`, `devices`: the chip, and how many.
    - `strategy`, `axes`: the name of the strategy, and the size of each mesh axis.
    - `layout`: the strategy as text, for [`mistral_eqx.Strategy`][].
    - `batch`, `kv_seq`: the rows of the cache, and the slots of each.
    - `formats`: the bytes of one chip's weights by format: of blocks, such as `"NF4/64"`, and the precision of others.
    - `all_weights`: the bytes of all weights, each counted once.
    - `cache`: the bytes of one chip's cache.
    """

    model: str
    chip: Chip
    devices: int
    strategy: str
    layout: str
    axes: dict[str, int]
    batch: int
    kv_seq: int
    formats: dict[str, int]
    all_weights: int
    cache: int

    @property
    def weights(self) -> int:
        """The bytes of one chip's weights."""
        return sum(self.formats.values())

    @property
    def total(self) -> int:
        """The bytes of one chip's weights and cache."""
        return self.weights + self.cache

    def to_dict(self) -> dict[str, Any]:
        """The fields and sums as dicts and numbers."""
        return {**dataclasses.asdict(self), "weights": self.weights, "total": self.total}


def smallest(
    model: MistralConfig | str,
    chip: Chip | str,
    *,
    quantize: Recipe | None = None,
    batch: int = 8,
    kv_seq: int | None = None,
    dtype: str = "bfloat16",
    cache_dtype: CacheDType | None = None,
) -> Holding:
    """The smallest number of chips, a power of two, whose memory holds the weights and the cache.

    They may take nine tenths of each chip's memory. [`mistral_eqx.plan`][] counts the temporary buffers too.

    ```python
    smallest("large-2-123b", "v5e", quantize=mx.NF4(), kv_seq=32_768).devices
    ```

    **Arguments:**

    - `model`, `quantize`, `batch`, `kv_seq`, `dtype`, `cache_dtype`: as for [`mistral_eqx.plan`][].
    - `chip`: the name of a chip of `mistral_eqx.planning.CHIPS`, or a [`mistral_eqx.planning.Chip`][] of your own.

    **Returns:** the number of chips, and the first legal strategy that holds the model on them.

    **Raises:** `ValueError` if a name or a size is wrong, a weight cannot be quantized, or 1024 chips do not suffice.
    """
    config, name = named(model)
    batch, slots = checked(batch, Count, "batch"), cache_slots(config, kv_seq)
    checked(cache_dtype, CacheDType | None, "cache_dtype")
    checked(dtype, DTypes, "dtype")
    if isinstance(chip, str):
        if chip not in CHIPS:
            raise InputError(f"The chip {shown(chip)} is not known; the chips are {', '.join(CHIPS)}.")
        chip = CHIPS[chip]
    room = SHARE * chip.hbm_bytes
    whole = whole_shapes(config, dtype, quantize)
    all_weights = device_bytes(whole)

    def cache_on(strategy: Strategy, mesh: AbstractMesh) -> int:
        held = slots_for(slots, strategy.parts("kv_seq", mesh))
        cache = cache_shapes(config, batch, held, dtype, cache_dtype, CHUNK, strategy, mesh, "tpu")
        return device_bytes(cache.layers)

    least = all_weights + cache_on(SINGLE, _mesh({"tp": 1}))
    for choice in _choices(config, batch):
        devices = math.prod(choice.axes.values())
        if least > devices * room:
            continue
        mesh, strategy = _mesh(choice.axes), choice.strategy
        try:
            formats = bytes_by_format(split_shapes(whole, strategy, mesh))
        except InputError:
            # The devices would cut blocks.
            continue
        cache = cache_on(strategy, mesh)
        if sum(formats.values()) + cache <= room:
            return Holding(
                model=name,
                chip=chip,
                devices=devices,
                strategy=choice.name,
                layout=strategy.layout,
                axes=choice.axes,
                batch=batch,
                kv_seq=slots,
                formats=formats,
                all_weights=all_weights,
                cache=cache,
            )
    raise InputError(
        f"The model does not fit into {_MOST_CHIPS} chips {chip.name} with a batch of {batch} and kv_seq {slots}; take "
        "a smaller batch, a shorter kv_seq or fewer bits."
    )


def _choices(config: MistralConfig, batch: int) -> Iterator[Choice]:
    """The legal strategies, those on fewer chips first."""
    yield Choice("single", SINGLE, {"tp": 1})
    for power in range(1, _MOST_CHIPS.bit_length()):
        for choice in strategies(config, 2**power):
            if batch % choice.strategy.parts("batch", choice.axes) == 0:
                yield choice


def _mesh(axes: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(axes.values()), tuple(axes))
