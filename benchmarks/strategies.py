"""Which strategy for 8 devices, which for 16, and from which length on does another one win?

    python benchmarks/strategies.py time --json time.json
    python benchmarks/strategies.py plan --json plan.json
    python benchmarks/strategies.py write time.json plan.json

`time` runs a small model of Mistral 7B's proportions under every legal strategy on virtual devices. Two cores stand
behind all of them, so that seconds say only what a strategy costs in operations; what it exchanges and what each
device holds carries over to real chips. `plan` compiles Mistral 7B for TPUs that are not here (extra `tpu`), and
estimates times from its operations, its bytes and its exchanges. `write` puts tables and pictures into the README
(extra `plot`).
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from rounds import table, timed, write

import mistral_eqx as mx
from mistral_eqx.generation import Sampler
from mistral_eqx.generation.request import Request
from mistral_eqx.parallel import Choice
from mistral_eqx.planning import CHIPS, Exchange, Report, decoding_step, exchange_seconds, prefill


HERE = Path(__file__).parent
MODEL = "7b-v0.2"
# An eighth of the 7B model's width in two layers, with as many heads.
SMALL = dataclasses.replace(
    mx.PRESETS[MODEL], embed=512, hidden=1792, head_dim=32, vocab=4096, layers=2, windows=(None, None)
)
TOPOLOGIES = {"v5e-8": "v5e:2x4", "v4-32": "v4:2x2x4", "v5e-16": "v5e:4x4"}
BATCH, PROMPT, KV_SEQ = 8, 512, 4096
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]


def choices(config: mx.MistralConfig, devices: int) -> list[Choice]:
    """The legal strategies, and of those that copy the model the ones with two copies."""
    found = mx.strategies(config, devices)
    return [choice for choice in found if choice.axes.get("dp", 1) == 1 or choice.name == "heads, batch over 2"]


def label(choice: Choice) -> str:
    """Name and mesh."""
    return f"{choice.name} ({', '.join(f'{axis}={size}' for axis, size in choice.axes.items())})"


# ---- time ----


def runs(repetitions: int) -> Iterator[dict[str, Any]]:
    """Runs prefill and decoding under every strategy, batch and length."""
    model = mx.Mistral.init(SMALL, key=jr.key(0))
    for devices in (8, 16):
        for choice in choices(SMALL, devices):
            parts = mx.shard(model, choice.mesh(), choice.strategy)
            for batch in (1, 8):
                if batch % choice.axes.get("dp", 1) == 0:
                    for length in (128, 1024):
                        yield _run(choice, parts, devices, batch, length, repetitions)


def _run(choice: Choice, model: mx.Mistral, devices: int, batch: int, length: int, repetitions: int) -> dict[str, Any]:
    rows = jr.randint(jr.key(1), (batch, length), 0, SMALL.vocab).tolist()
    steps, request = 8, Request.init(model, rows, 64, Sampler(), None, None)
    state, cache = jax.block_until_ready(request.start(rows))
    read, decoded = [], []
    for _ in range(repetitions):
        taken, (state, cache) = timed(lambda: jax.block_until_ready(request.start(rows)))
        read.append(taken)
        state, cache = jax.block_until_ready(request.decode(state, cache, 2))
        taken, (state, cache) = timed(lambda *at: jax.block_until_ready(request.decode(*at, 2 + steps)), state, cache)
        decoded.append(taken / steps)
    sizes = {"batch": batch, "dtype": jnp.float32}
    exchanged = {
        "prefill": prefill(SMALL, choice.strategy, choice.axes, seq=min(length, 512), kv_seq=length, **sizes),
        "decode": decoding_step(SMALL, choice.strategy, choice.axes, kv_seq=cache.kv_seq, **sizes),
    }
    result = {
        "devices": devices,
        "strategy": label(choice),
        "batch": batch,
        "length": length,
        "prefill_ms": 1e3 * statistics.median(read),
        "decode_ms": 1e3 * statistics.median(decoded),
        "weights_mb": held(model) / 1e6,
        "cache_mb": held(cache.layers) / 1e6,
    }
    for name, entries in exchanged.items():
        result[f"{name}_exchanges"] = sum(entry.count for entry in entries)
        result[f"{name}_kb"] = sum(entry.count * entry.bytes for entry in entries) / 1e3
    return result


def held(tree: Any) -> int:
    """The bytes that the first device holds of it."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


# ---- plan ----


def planned(topologies: list[str], done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Plans the whole model.

    Of strategies that can have several meshes, that with the most groups of key/value heads is taken. What is in
    `done` is not planned again.
    """
    known = {(row["place"], row["strategy"]) for row in done}
    for place in topologies:
        for choice in planned_choices(place):
            if (place, label(choice)) not in known:
                report = mx.plan(
                    MODEL,
                    topology=TOPOLOGIES[place],
                    strategy=choice,
                    batch=BATCH,
                    prompt=PROMPT,
                    kv_seq=KV_SEQ,
                )
                yield {"place": place, "strategy": label(choice), "report": report.to_dict()}


def planned_choices(place: str) -> list[Choice]:
    """The first mesh of each strategy."""
    found = choices(mx.PRESETS[MODEL], 8 if place == "v5e-8" else 16)
    return list({choice.name: choice for choice in reversed(found)}.values())[::-1]


def seconds(terms: dict[str, float]) -> float:
    """A layer waits for what is exchanged, so that this does not overlap with its work."""
    return max(terms["compute"], terms["memory"]) + terms["interconnect"]


def decode_seconds(report: Report, kv_seq: int) -> float:
    """The time of a step at another length: what more there is of the cache is read once more, and more is exchanged.

    At the length that was compiled, it is the time of the compiled program.
    """
    decode, chip = report["decode"], CHIPS[report.place.partition(":")[0]]
    more = decode.memory.cache * (kv_seq / report.kv_seq - 1)
    work = max(decode.flops / chip.flops, (decode.hbm_bytes + more) / chip.hbm_bandwidth)
    lengths = {
        length: sum(
            exchange_seconds(chip, Exchange(entry.kind, entry.devices, entry.count, entry.count * entry.bytes))
            for entry in decoding_step(
                mx.PRESETS[MODEL], mx.Strategy(report.layout), report.axes, batch=BATCH, kv_seq=length
            )
        )
        for length in (report.kv_seq, kv_seq)
    }
    return work + decode.roofline.interconnect + lengths[kv_seq] - lengths[report.kv_seq]


# ---- write ----


def tables(times: list[dict[str, Any]], plans: list[dict[str, Any]]) -> str:
    """What stands in the README."""
    parts = []
    for devices in (8, 16):
        for length in (128, 1024):
            found = [row for row in times if (row["devices"], row["length"]) == (devices, length)]
            if not found:
                continue
            parts.append(f"**{devices} virtual devices, {length} tokens**\n")
            parts.append(_times(found) + "\n")
    for place in TOPOLOGIES:
        reports = [row for row in plans if row["place"] == place]
        if reports:
            parts.append(
                f"**Mistral 7B v0.2 in bfloat16 on {place}, batch {BATCH}, a prompt of {PROMPT}, kv_seq {KV_SEQ}**\n"
            )
            parts.append(_plans(reports) + "\n")
    for place in TOPOLOGIES:
        lines = _lines(plans, place)
        if lines:
            rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in lines.items()]
            parts.append(f"**Milliseconds a decoding step on {place}, by length of the cache**\n")
            parts.append(table([["strategy", *map(str, LENGTHS)], *rows]) + "\n")
    return "\n".join(parts)


def _times(found: list[dict[str, Any]]) -> str:
    head = ["strategy", "weights, MB", "batch", "cache, MB", "prefill, ms", "exchanges", "kB"]
    rows = [
        [
            row["strategy"],
            f"{row['weights_mb']:.1f}",
            str(row["batch"]),
            f"{row['cache_mb']:.2f}",
            f"{row['prefill_ms']:.0f}",
            str(row["prefill_exchanges"]),
            f"{row['prefill_kb']:,.0f}",
            f"{row['decode_ms']:.1f}",
            str(row["decode_exchanges"]),
            f"{row['decode_kb']:,.0f}",
        ]
        for row in found
    ]
    return table([[*head, "decode step, ms", "exchanges", "kB"], *rows])


def _plans(reports: list[dict[str, Any]]) -> str:
    rows = []
    for row in reports:
        phases = _phases(row)
        decode, read = phases["decode"], phases["prefill"]
        peak = max(phase["memory"]["total"] for phase in phases.values())
        fits = f"fits, {row['report']['free'] / 1e9:.1f} free" if row["report"]["fits"] else "does not fit"
        cells = [row["strategy"], f"{decode['memory']['weights'] / 1e9:.2f}", f"{decode['memory']['cache'] / 1e9:.2f}"]
        cells += [f"{peak / 1e9:.2f}", fits]
        for phase in (read, decode):
            terms = phase["roofline"]
            count, moved = (sum(entry[key] for entry in phase["exchanges"]) for key in ("count", "bytes"))
            if terms is None:
                cells += ["", "", ""]
            else:
                cells += [str(count), f"{moved / 1e6:,.1f}", f"{1e3 * phase['runs'] * seconds(terms):.2f}"]
        rows.append(cells)
    head = ["strategy", "weights, GB", "cache, GB", "peak, GB", ""]
    head += [f"{phase} {what}" for phase in ("prefill", "decode") for what in ("exchanges", "MB", "ms")]
    return table([head, *rows])


def _phases(row: dict[str, Any]) -> dict[str, Any]:
    return {phase["name"]: phase for phase in row["report"]["phases"]}


def _lines(plans: list[dict[str, Any]], place: str) -> dict[str, list[float]]:
    """Milliseconds by length for each strategy."""
    reports = {row["strategy"]: Report.from_dict(row["report"]) for row in plans if row["place"] == place}
    return {name: [1e3 * decode_seconds(report, length) for length in LENGTHS] for name, report in reports.items()}


def draw(times: list[dict[str, Any]], plans: list[dict[str, Any]], folder: Path):
    """Two pictures: time by length on each topology, and what each strategy exchanges a decoding step."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(TOPOLOGIES), figsize=(15, 5), layout="constrained")
    names = dict.fromkeys(row["strategy"].split(" (")[0] for row in plans)
    colours = {name: f"C{index}" for index, name in enumerate(names)}
    for panel, place in zip(panels, TOPOLOGIES, strict=True):
        for name, values in _lines(plans, place).items():
            # What two strategies have in common is seen as both.
            style = "--" if name.startswith("sequence") else "-"
            colour = colours[name.split(" (")[0]]
            panel.plot(LENGTHS, values, label=name, color=colour, linestyle=style, marker=".")
        panel.set(xscale="log", yscale="log", title=place, xlabel="slots in the cache", xticks=LENGTHS)
        panel.set_xticklabels([f"{length // 1024}k" for length in LENGTHS])
        panel.set_ylim(1.5, 40)
        panel.set_yticks([2, 3, 5, 10, 20], ["2", "3", "5", "10", "20"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("ms a decoding step, batch 8 (estimate)")
    figure.savefig(folder / "strategies_length.png", dpi=110)
    plt.close(figure)

    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for panel, devices in zip(panels, (8, 16), strict=True):
        found = [row for row in times if (row["devices"], row["batch"]) == (devices, 8)]
        names = list(dict.fromkeys(row["strategy"] for row in found))
        for offset, length in ((0.2, 128), (-0.2, 1024)):
            values = [row["decode_kb"] for row in found if row["length"] == length]
            panel.barh([index + offset for index in range(len(names))], values, 0.38, label=f"{length} tokens")
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.set(xscale="log", xlabel="kB put into exchanges a decoding step", title=f"{devices} devices, batch 8")
        panel.invert_yaxis()
        panel.grid(axis="x", alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(folder / "strategies_exchanged.png", dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("time", help="run on virtual devices")
    timing.add_argument("--json", type=Path, required=True)
    timing.add_argument("--repetitions", type=int, default=3)
    planning = commands.add_parser("plan", help="compile for TPUs that are not here")
    planning.add_argument("--json", type=Path, required=True)
    planning.add_argument("--topologies", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    writing = commands.add_parser("write", help="put both into the README")
    writing.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "write":
        rows = [row for file in arguments.files for row in json.loads(file.read_text())]
        times, plans = [row for row in rows if "place" not in row], [row for row in rows if "place" in row]
        draw(times, plans, HERE)
        write(tables(times, plans).strip(), "strategies")
        return
    if arguments.command == "time":
        jax.config.update("jax_num_cpu_devices", 16)
        done, rows = [], runs(arguments.repetitions)
    else:
        done = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        rows = planned(arguments.topologies, list(done))
    for row in rows:
        done.append(row)
        # Written as it goes: an interrupted run keeps what it has.
        arguments.json.write_text(json.dumps(done))
        print(len(done), row.get("place", ""), row["strategy"], row.get("length", ""), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
