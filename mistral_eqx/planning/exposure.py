"""How long the products of a layer wait for the exchange of their tokens, in closed form."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
from jax.typing import DTypeLike

from ..checks import Count, checked
from ..config import MistralConfig
from ..errors import InputError
from ..parallel import Strategy
from .chips import Chip
from .communication import Ledger
from .limits import HOP_SECONDS, exchange_seconds
from .report import Exchange


@dataclasses.dataclass(frozen=True)
class Exposed:
    """An exchange of a layer and the product before or after it, at the peaks of a chip.

    **Attributes:**

    - `what`: the name of the exchange, as in [`mistral_eqx.planning.forward_pass`][].
    - `product`: the seconds of the product for all tokens at once.
    - `wait`: how many more seconds product and exchange take together. With `overlap` these are the hops that take
        longer than the product of a slice, and the weights that are read again for each slice.
    """

    what: str
    product: float
    wait: float


def exposed(
    config: MistralConfig,
    strategy: Strategy,
    axes: Mapping[str, int],
    chip: Chip,
    *,
    batch: int,
    seq: int,
    dtype: DTypeLike = jnp.bfloat16,
    backward: bool = False,
) -> list[Exposed]:
    """The four exchanges of one layer that `tokens` splits, and how long the products wait for them.

    **Arguments:**

    - `config`, `strategy`, `axes`, `dtype`: as for [`mistral_eqx.planning.forward_pass`][].
    - `chip`: the chip.
    - `batch`: the number of rows, over all devices.
    - `seq`: the tokens of each row in this pass; 1 for a decoding step, whose sums are `all_reduce`s.
    - `backward`: for the backward pass, which has two products for each of the forward pass.

    **Returns:** one entry for each exchange; those of a decoding step are two.

    **Raises:** `ValueError` as for `forward_pass`, and for a model with experts or latent attention.
    """
    seq = checked(seq, Count, "seq")
    if config.routing is not None or config.latent is not None:
        raise InputError(
            "There is no closed form of the exposed exchanges of a model with experts or latent attention; plan it."
        )
    ledger = Ledger(config, strategy, axes, batch, dtype)
    own = ledger.own_tokens(seq)
    tokens, devices, ways = ledger.rows * own, ledger.token_shards(own), strategy.overlap

    def seconds(entries: int, tokens: int) -> float:
        """The time of a product: its operations, or to read its weights."""
        return max((4 if backward else 2) * tokens * entries / chip.flops, entries * ledger.narrow / chip.hbm_bandwidth)

    found = []
    for what, entries, dims, gathers in _products(ledger):
        product = seconds(entries, tokens)
        size = tokens * config.embed * ledger.narrow
        if not ways or devices == 1:
            ledger.entries.clear()
            if devices == 1:
                ledger.all_reduce(what, 1 if gathers else ledger.num_shards(dims), 1, own, config.embed)
            else:
                (ledger.all_gather if gathers else ledger.reduce_scatter)(what, devices, 1, own, config.embed)
            if not ledger.entries:
                continue
            exchanges = [Exchange(one.kind, one.devices, 1, one.bytes) for one in ledger.entries]
            wait = sum(exchange_seconds(chip, exchange) for exchange in exchanges)
        else:
            # A device that sends along one link only has the whole of a switch for it.
            lanes = 2 if chip.switched is not None and (ways == 1 or devices == 2) else 1
            hop = HOP_SECONDS + size / devices / (lanes * chip.link_bandwidth)
            part = seconds(entries, tokens // devices)
            wait = ring_wait(ways, devices, hop, part) + devices * part - product
        found.append(Exposed(what, product, wait))
    return found


def ring_wait(ways: int, devices: int, hop: float, product: float) -> float:
    """How long products on a ring wait for the hops of their slices, after the first product has begun.

    In one direction, each of `devices - 1` hops runs beside the product of one slice. In two directions there are
    `devices // 2` hops, of which all but one run beside the products of two slices. Sums travel by the same schedule in
    the reverse order.

    **Arguments:**

    - `ways`: the number of directions, 1 or 2.
    - `devices`: the number of devices on the ring.
    - `hop`: the seconds of one hop.
    - `product`: the seconds of the product of one slice.
    """
    hops = devices // 2 if ways == 2 else devices - 1
    return max(0.0, hop - product) + (hops - 1) * max(0.0, hop - ways * product)


def _products(ledger: Ledger) -> Iterator[tuple[str, int, str, bool]]:
    """The name, the entries on a device, the split dimensions, and whether tokens are gathered before the product."""
    config, queries = ledger.config, "kv_heads q_per_kv head_dim"
    heads, keys = ledger.local(queries), ledger.local("kv_heads head_dim")
    hidden = ledger.local("hidden")
    yield "attention input", config.embed * (heads + 2 * keys), queries, True
    yield "attention output", config.embed * heads, queries, False
    yield "feed-forward input", config.embed * 2 * hidden, "hidden", True
    yield "feed-forward output", config.embed * hidden, "hidden", False
