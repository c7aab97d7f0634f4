"""Experts on several devices: do all devices see all tokens, or do tokens travel to their experts?

    python benchmarks/expert_exchange.py [--json expert_exchange.json] [--write]

One layer of experts computes the same tokens on eight virtual devices in four ways:

- *all tokens*: every device has all tokens and computes its own experts; one psum adds the sums.
- *parts of experts*: every device has all tokens and an eighth of every expert; one psum.
- *gathered*: tokens and experts are split over the same axis; each device gathers all tokens, and sums are scattered.
- *all_to_all*: tokens and experts are split over the same axis; tokens travel to their experts and back.

Two cores stand behind all devices, so that seconds say only what a way costs in operations; what a device sends carries
over to real chips. `even` tokens choose all experts alike, `alike` tokens the same ones, which exceed the buffers.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from rounds import positive, table, timed, write

import mistral_eqx as mx
from mistral_eqx.nn import Experts
from mistral_eqx.nn.expert_exchange import gathered
from mistral_eqx.parallel import specs, spmd, with_strategy
from mistral_eqx.planning.limits import sent_share
from mistral_eqx.planning.stablehlo import written


DEVICES, SEQ, EMBED, HIDDEN = 8, 512, 256, 512
WAYS = {
    "all tokens": "experts@dp",
    "parts of experts": "hidden@dp",
    "gathered": "batch@dp experts@dp",
    "all_to_all": "batch@dp experts@dp",
}
ROUTINGS = (mx.Routing(experts=8, per_token=2), mx.Routing(experts=64, per_token=4))


def layer(routing: mx.Routing) -> Experts:
    """Experts with random weights."""
    config = dataclasses.replace(
        mx.PRESETS["8x7b"], vocab=16, embed=EMBED, hidden=HIDDEN, layers=1, windows=(None,), routing=routing
    )
    found = mx.Mistral.init(config, key=jr.key(0)).blocks[0].feed_forward
    assert isinstance(found, Experts)
    return found


def runs(repetitions: int) -> Iterator[dict[str, Any]]:
    """Each way with each routing and kind of tokens, and with few tokens as in a decoding step."""
    mesh = mx.make_mesh({"dp": DEVICES})
    for routing in ROUTINGS:
        whole = layer(routing)
        for seq, kind in ((SEQ, "even"), (SEQ, "alike"), (1, "even")):
            x = jr.normal(jr.key(1), (DEVICES, seq, EMBED))
            if kind == "alike":
                x = 0.01 * x + jr.normal(jr.key(2), (EMBED,))[None, None]
            for way, layout in WAYS.items():
                yield _run(way, mx.Strategy(layout), whole, x, mesh, repetitions) | {
                    "experts": routing.experts,
                    "per_token": routing.per_token,
                    "tokens": DEVICES * seq,
                    "kind": kind,
                }


def _run(
    way: str, strategy: mx.Strategy, whole: Experts, x: jax.Array, mesh: jax.sharding.Mesh, repetitions: int
) -> dict[str, Any]:
    def compute(layer: Experts, x: jax.Array) -> jax.Array:
        return gathered(layer.own_sums, layer.router, x, ("dp",)) if way == "gathered" else layer(x)

    split, rows = with_strategy(whole, strategy), strategy.spec("batch _ _")
    places = specs(split, strategy)
    run: Any = eqx.filter_jit(spmd(compute, mesh, (places, rows), rows))
    placed = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)) if eqx.is_array(leaf) else leaf,
        split,
        places,
        is_leaf=lambda leaf: leaf is None,
    )
    arguments = placed, jax.device_put(x, jax.NamedSharding(mesh, rows))
    exchanges = written(run.lower(*arguments).lowered)
    jax.block_until_ready(run(*arguments))
    times = [timed(lambda: jax.block_until_ready(run(*arguments)))[0] for _ in range(repetitions)]
    return {
        "way": way,
        "exchanges": sum(one.count for one in exchanges),
        "sent_kb": sum(sent_share(one.kind, one.devices) * one.bytes for one in exchanges) / 1e3,
        "ms": 1e3 * statistics.median(times),
    }


def tables(found: list[dict[str, Any]]) -> str:
    """What stands in the README."""
    rows = []
    for row in found:
        routing = f"{row['per_token']} of {row['experts']}"
        cells = [row["way"], routing, f"{row['tokens']}", row["kind"]]
        rows.append([*cells, f"{row['exchanges']}", f"{row['sent_kb']:,.1f}", f"{row['ms']:.1f}"])
    return table([["", "experts", "tokens", "", "exchanges", "kB a device sends", "ms"], *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=positive, default=5, help="measurements of each layer (5)")
    parser.add_argument("--json", type=Path, default=None, help="write all figures to this file")
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    found = list(runs(arguments.repetitions))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found))
    if arguments.write:
        write(tables(found), "expert_exchange")
    print(tables(found))


if __name__ == "__main__":
    main()
