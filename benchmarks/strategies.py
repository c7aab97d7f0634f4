"""Which strategy for 8 devices, which for 16, and from which length on does another one win?

    python benchmarks/strategies.py time --json time.json
    python benchmarks/strategies.py plan --json plan.json
    python benchmarks/strategies.py write time.json plan.json

`time` runs a small model of Mistral 7B's proportions under every legal strategy on virtual devices. Two cores stand
behind all of them, so that seconds say only what a strategy costs in operations; what it exchanges and what each
device holds carries over to real chips. `plan` compiles Mistral 7B for TPUs that are not here (extra `tpu`), and
estimates times from its operations, its bytes and its exchanges. `write` puts tables and pictures of the given files
into the README (extra `plot`), and the answers that follow from closed forms alone, those for training too.
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
from mistral_eqx.planning import (
    CHIPS,
    Collective,
    Exchange,
    Report,
    Training,
    decoding_step,
    exchange_seconds,
    exposed,
    forward_pass,
    prefill,
    rank,
    training_step,
)
from mistral_eqx.planning.limits import sent_share


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


def more_choices(devices: int) -> list[Choice]:
    """Of what splits the tokens of rows or overlaps its exchanges: alone, and beside the heads."""
    ways = {"ring": "seq@cp kv_seq@cp", "gather": "seq@cp"}
    found = [Choice(name, mx.Strategy(entries), {"cp": devices}) for name, entries in ways.items()]
    half = {"cp": 2, "tp": devices // 2}
    found += [Choice(f"heads, {name} over 2", mx.HEADS + entries, half) for name, entries in ways.items()]
    if devices <= SMALL.kv_heads:
        found += [Choice("sequence_parallel overlap", mx.SEQUENCE_PARALLEL + "overlap", {"tp": devices})]
    return found


def label(choice: Choice) -> str:
    """Name and mesh."""
    return f"{choice.name} ({', '.join(f'{axis}={size}' for axis, size in choice.axes.items())})"


# ---- time ----


def runs(repetitions: int) -> Iterator[dict[str, Any]]:
    """Runs prefill and decoding under every strategy, batch and length."""
    model = mx.Mistral.init(SMALL, key=jr.key(0))
    for devices in (8, 16):
        for choice in [*choices(SMALL, devices), *more_choices(devices)]:
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
    form, sizes = (SMALL, choice.strategy, choice.axes), {"batch": batch, "dtype": jnp.float32}
    # Devices that split the tokens of rows have a chunk each.
    chunk = min(length, 512 * choice.strategy.parts("seq", choice.axes))
    exchanged = {
        "prefill": length // chunk * prefill(*form, seq=chunk, kv_seq=length, **sizes),
        "decode": decoding_step(*form, kv_seq=cache.kv_seq, **sizes),
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


# ---- closed forms ----


TRAINED, TRAIN_TOPOLOGY, TRAIN_ROWS = "7b-v0.2", "v5p:2x2x2", 64
# The layouts of eight devices whose steps are compared, by what they split; each in its best stage of ZeRO that fits.
LAYOUTS = {
    "heads": "heads",
    "heads and tokens": "sequence_parallel",
    "the same, overlapped": "sequence_parallel overlap",
    "rows": "batch@dp",
    "tokens of rows, ring": "heads seq@cp kv_seq@cp",
    "tokens of rows, gather": "heads seq@cp",
    "layers": "layers@pp",
    "layers and rows": "layers@pp batch@dp",
    "layers, heads and tokens, overlapped": "sequence_parallel layers@pp overlap",
}


def training() -> str:
    """The estimate of a step of training under each parallelism, and what a device sends, along rings."""
    ranking = rank(TRAINED, topology=TRAIN_TOPOLOGY, objective="train", batch=TRAIN_ROWS, train=Training(seq=4096))
    config = mx.PRESETS[TRAINED]
    lines = [
        [
            "split",
            "layout",
            "GB of a device",
            "exchanges",
            "GB sent",
            "compute, s",
            "links, s",
            "bubble, s",
            "in all, s",
        ]
    ]
    for name, layout in LAYOUTS.items():
        for schedule in ("gpipe", "1f1b") if "layers@" in layout else ("gpipe",):
            found = [one for one in ranking.best if one.choice.strategy == mx.parallel.read_strategy(layout)]
            for one in [one for one in found if one.training.schedule == schedule][:1]:
                entries = training_step(
                    config, one.choice.strategy, one.choice.axes, batch=TRAIN_ROWS, training=one.training
                )
                times = one.times.compute, one.times.interconnect, one.times.bubble, one.seconds
                lines.append(
                    [
                        name,
                        f"`{one.label}`",
                        f"{one.memory.total / 1e9:.1f}",
                        f"{sum(entry.count for entry in entries):,}",
                        f"{sent(entries) / 1e9:,.1f}",
                        *(f"{seconds:.2f}" for seconds in times),
                    ]
                )
    return table(lines)


def sent(entries: list[Collective]) -> float:
    """The bytes that a device sends, if each exchange goes along a ring."""
    return sum(sent_share(entry.kind, max(entry.devices, 2)) * entry.count * entry.bytes for entry in entries)


# Bytes per second of a device to those of another host: each of eight H100 in a server has 400 Gbit/s of InfiniBand, a
# v5p 50 Gbit/s of the data centre's network (https://docs.cloud.google.com/tpu/docs/tpu7x has a table).
NETWORKS = {"H100": 50e9, "v5p": 6.25e9}


def across_hosts() -> str:
    """What a step of training sends between two hosts of eight devices, by what is split over them."""
    config, rows, seq = mx.PRESETS["small-3.1-24b"], 64, 4096
    head = ["over the hosts", "exchanges", "GB a device sends", *(f"s, {name}" for name in NETWORKS)]
    lines = [[*head, "products, s (H100)", "waits in the bubble"]]
    names = {
        "heads": ("kv_replicated", {"kv": 8, "rep": 2}, Training(seq)),
        "tokens, gathered": ("sequence_parallel seq@cp", {"cp": 2, "tp": 8}, Training(seq)),
        "rows, ZeRO 1": ("sequence_parallel batch@dp", {"dp": 2, "tp": 8}, Training(seq, 1)),
        "layers, GPipe": ("sequence_parallel layers@pp", {"pp": 2, "tp": 8}, Training(seq, accumulate=16)),
        "layers, 1F1B": (
            "sequence_parallel layers@pp", {"pp": 2, "tp": 8}, Training(seq, accumulate=16, schedule="1f1b"),
        ),
    }  # fmt: skip
    for name, (layout, axes, training) in names.items():
        entries = training_step(config, mx.parallel.read_strategy(layout), axes, batch=rows, training=training)
        # Groups of eight are the devices of a host.
        across = [entry for entry in entries if entry.devices != 8]
        # Forward, again, and twice backward; 1F1B computes a stage forward once more.
        passes = 10 if training.schedule == "1f1b" else 8
        products = passes * config.parameters * rows * seq / 16 / CHIPS["H100"].flops
        bubble = 0.0 if "pp" not in axes else 1 - training.accumulate / training.ticks(2)
        lines.append(
            [
                f"{name}: `{layout}`",
                f"{sum(entry.count for entry in across):,}",
                f"{sent(across) / 1e9:,.2f}",
                *(f"{sent(across) / speed:.2f}" for speed in NETWORKS.values()),
                f"{products:.1f}",
                f"{bubble:.0%}",
            ]
        )
    return table(lines)


def key_waits(chip: str, config: mx.MistralConfig, seq: int, devices: int = 8) -> tuple[float, float]:
    """The seconds that attention waits for keys in a forward pass of one row: with a ring, and with a gather.

    A hop is sent while the device computes with the keys before.
    """
    axes, sizes, of = {"cp": devices}, {"batch": 1, "seq": seq}, CHIPS[chip]

    def keys(layout: str) -> Exchange:
        (one,) = (one for one in forward_pass(config, mx.Strategy(layout), axes, **sizes) if "keys" in one.what)
        return Exchange(one.kind, one.devices, one.count, one.count * one.bytes)

    ring = keys("seq@cp kv_seq@cp")
    # Keys and values of a hop are two permutes.
    hops = ring.count // 2
    hop = exchange_seconds(of, ring) / hops
    product = 2 * (seq / devices) ** 2 * config.q_heads * config.head_dim / of.flops
    return hops * max(0.0, hop - product), exchange_seconds(of, keys("seq@cp"))


def ring_or_gather() -> str:
    """How long attention waits for keys, by the length of a row on eight devices."""
    lengths = [2**power for power in range(12, 19)]
    lines = [["model", "on 8", *(f"{seq // 1024}k" for seq in lengths), "ring from"]]
    for model in ("7b-v0.2", "large-2-123b"):
        config = dataclasses.replace(mx.PRESETS[model], max_positions=2**20)
        for chip in ("v5e", "v5p", "v6e", "H100"):
            waits = [key_waits(chip, config, seq) for seq in lengths]
            steps = (
                seq
                for seq in range(1024, 2**19, 1024)
                if key_waits(chip, config, seq)[0] < key_waits(chip, config, seq)[1]
            )
            first = next(steps, None)
            cells = [f"{1e3 * ring:.1f} / {1e3 * gather:.1f}" for ring, gather in waits]
            lines.append([f"`{model}`", chip, *cells, "never" if first is None else f"{first:,}"])
    return table(lines)


def overlap_from() -> str:
    """From how many tokens on products wait less with overlap, and what share of the time that saves at 8192."""
    lines = [["model", "on 8", "prefill from", "saves at 8192", "training from", "saves at 8192"]]
    for model in ("7b-v0.2", "large-2-123b"):
        for chip in ("v4", "v5e", "v5p", "v6e", "H100"):
            cells = []
            for passes in ((False,), (False, True)):

                def seconds(word: str, seq: int, passes=passes, model=model, chip=chip) -> float:
                    form = mx.PRESETS[model], mx.SEQUENCE_PARALLEL + word, {"tp": 8}, CHIPS[chip]
                    found = [one for back in passes for one in exposed(*form, batch=1, seq=seq, backward=back)]
                    return sum(one.product + one.wait for one in found)

                def best(seq: int, seconds=seconds) -> float:
                    return min(seconds("overlap", seq), seconds("overlap=1", seq))

                lengths = [2**power for power in range(6, 18)]
                first = next((seq for seq in lengths if best(seq) < seconds("", seq)), None)
                saved = 1 - best(8192) / seconds("", 8192)
                cells += ["never" if first is None else f"{first:,}", f"{saved:.0%}"]
            lines.append([f"`{model}`", chip, *cells])
    return table(lines)


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


def time_tables(times: list[dict[str, Any]]) -> str:
    """Prefill and decoding on virtual devices."""
    parts = []
    for devices in (8, 16):
        for length in (128, 1024):
            found = [row for row in times if (row["devices"], row["length"]) == (devices, length)]
            if not found:
                continue
            parts.append(f"**{devices} virtual devices, {length} tokens**\n")
            parts.append(_times(found) + "\n")
    return "\n".join(parts)


def plan_tables(plans: list[dict[str, Any]]) -> str:
    """Mistral 7B, compiled for TPUs."""
    parts = []
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


def draw_plans(plans: list[dict[str, Any]], folder: Path):
    """Time by length on each topology."""
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


def draw_times(times: list[dict[str, Any]], folder: Path):
    """What each strategy exchanges a decoding step."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
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
    writing = commands.add_parser("write", help="put them into the README")
    writing.add_argument("files", type=Path, nargs="*")
    arguments = parser.parse_args()
    if arguments.command == "write":
        rows = [row for file in arguments.files for row in json.loads(file.read_text())]
        times, plans = [row for row in rows if "place" not in row], [row for row in rows if "place" in row]
        for name, found, block, draw in (
            ("strategies_time", times, time_tables, draw_times),
            ("strategies_plan", plans, plan_tables, draw_plans),
        ):
            if found:
                write(block(found).strip(), name)
                draw(found, HERE)
        for answer in (training, across_hosts, ring_or_gather, overlap_from):
            write(answer(), f"strategies_{answer.__name__}")
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
