"""Which layout for which model, on how many chips? Estimates by `mistral_eqx.planning.rank`, of nothing that was run.

    python benchmarks/layouts.py --write

`--write` puts the tables and plots into docs/which_layout.md: the layouts that are chosen for three models on three
slices, the time of each kind of layout by the number of chips, pipelines beside the others, and estimates beside
published figures. It takes some minutes.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

from rounds import table, use_cpu, write

import mistral_eqx as mx
from mistral_eqx.planning import Ranking, Training, rank


DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "which_layout.md"
MODELS = ("7b-v0.3", "small-3.1-24b", "large-2-123b")
PLACES = {"v5e-16": "v5e:4x4", "v5p-64 (32 chips)": "v5p:2x4x4", "8 H100": "H100:8"}
# The sides of slices of v5p.
SIDES = ("1x1x1", "1x2x2", "2x2x4", "4x4x4", "4x8x8", "8x8x16", "16x16x16")
# The rows of 4096 tokens in a step that does not grow with the number of chips: 4 million tokens.
ROWS = 1024

# Shapes of models that others published figures of.
LLAMA_70B = mx.MistralConfig(
    vocab=32_000, embed=8192, hidden=28_672, layers=80, kv_heads=8, q_per_kv=8, head_dim=128, rope_theta=1e4,
    norm_eps=1e-5, max_positions=4096, windows=(None,) * 80,
)  # fmt: skip
LLAMA_405B = mx.MistralConfig(
    vocab=128_256, embed=16_384, hidden=53_248, layers=126, kv_heads=8, q_per_kv=16, head_dim=128, rope_theta=5e5,
    norm_eps=1e-5, max_positions=131_072, windows=(None,) * 126,
)  # fmt: skip
SCALED = {
    **{name: mx.PRESETS[name] for name in ("7b-v0.3", "small-3.1-24b", "large-2-123b", "8x22b", "large-3-675b")},
    "Llama 3.1 405B": LLAMA_405B,
}


def chosen() -> str:
    """The first layout of each model, slice and objective."""
    rows = [["model", "on", "latency of a request", "throughput", "a step of training"]]
    for model in MODELS:
        for number, (name, topology) in enumerate(PLACES.items()):
            print(model, name, file=sys.stderr, flush=True)
            cells = []
            for objective in ("latency", "throughput", "train"):
                sizes = {"batch": 64, "train": Training(seq=4096)} if objective == "train" else {"kv_seq": 4096}
                try:
                    best = rank(model, topology=topology, objective=objective, **sizes).best[0]
                except mx.InputError:
                    cells.append("does not fit")
                    continue
                worth = {
                    "latency": f"{1e3 * best.seconds / 3584:.1f} ms a token",
                    "throughput": f"{best.tokens_per_second:,.0f} tokens/s with {best.batch} rows",
                    "train": f"{best.seconds:.1f} s, MFU {best.utilization:.0%}",
                }[objective]
                cells.append(f"`{best.label}`: {worth}, bound by {_part(best.times.bound)}")
            rows.append([f"`{model}`" if number == 0 else "", name, *cells])
    return table(rows)


def _part(bound: str) -> str:
    return {"memory": "HBM", "interconnect": "links", "bubble": "the bubble"}.get(bound, bound)


def kind(layout: str) -> str:
    """What a layout splits beside rows."""
    names = [name.partition("@")[0].partition("=")[0] for name in layout.split()]
    for one in ("experts", "overlap", "head_dim", "kv_seq", "tokens", "q_per_kv", "kv_heads"):
        if one in names:
            return one
    return "rows alone"


@functools.cache
def ranked(model: str, sides: str, objective: str) -> Ranking | None:
    """The ranking on a slice of v5p; `None` if nothing fits."""
    count = math.prod(int(side) for side in sides.split("x"))
    print(model, objective, count, file=sys.stderr, flush=True)
    sizes = {"batch": 1} if objective == "latency" else {"batch": ROWS, "train": Training(seq=4096)}
    try:
        return rank(SCALED[model], topology=f"v5p:{sides}", objective=objective, **sizes)
    except mx.InputError as error:
        print(str(error)[:200], file=sys.stderr, flush=True)
        return None


def by_chips() -> dict[str, dict[str, list[tuple[int, float]]]]:
    """For each model and kind of layout, the best time of a token by the number of chips."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for model in SCALED:
        for sides in SIDES:
            ranking, best = ranked(model, sides, "latency"), {}
            for one in () if ranking is None else ranking.best:
                best.setdefault(kind(one.choice.strategy.layout), one.seconds / ranking.new_tokens)
            for name, seconds in best.items():
                found.setdefault(model, {}).setdefault(name, []).append((ranking.devices, seconds))
    return found


def staged() -> list[list[str]]:
    """The lines of a table: the best layout without stages and the best pipeline, for a fixed number of rows."""
    rows = [["model", "chips v5p", "without stages", "s", "MFU", "pipeline", "s", "MFU", "of that bubble"]]
    for model, config in SCALED.items():
        # A step with latent attention or shared experts has no closed form.
        if config.latent is not None or (config.routing is not None and config.routing.shared):
            continue
        name = f"`{model}`" if model in mx.PRESETS else model
        for sides in SIDES:
            ranking = ranked(model, sides, "train")
            if ranking is None:
                continue
            cells = [name, f"{ranking.devices:,}"]
            for pipeline in (False, True):
                best = [one for one in ranking.best if ("layers@" in one.choice.strategy.layout) == pipeline][:1]
                cells += [
                    cell for one in best for cell in (f"`{one.label}`", f"{one.seconds:.2f}", f"{one.utilization:.0%}")
                ]
                cells += [] if best else ["none fits", "", ""]
                if pipeline:
                    cells += [f"{one.times.bubble / one.seconds:.0%}" for one in best] or [""]
            rows.append(cells)
            name = ""
    return rows


def plot_stages(rows: list[list[str]], path: Path):
    """The MFU of the best layouts with and without stages, by the number of chips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[list[str]]] = {}
    for row in rows[1:]:
        lines.setdefault(row[0].strip("`") or next(reversed(lines)), []).append(row)
    figure, axes = plt.subplots(1, len(lines), figsize=(3.2 * len(lines), 3), sharey=True, layout="constrained")
    for axis, (model, found) in zip(axes, lines.items(), strict=True):
        for column, name in ((4, "without stages"), (7, "pipeline")):
            points = [(int(row[1].replace(",", "")), int(row[column].strip("%"))) for row in found if row[column]]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axis.set_xscale("log", base=2)
        axis.set(title=model, xlabel="chips v5p", ylim=(0, 80))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("MFU, %")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot(path: Path):
    """The time of a token by the number of chips, for each kind of layout."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = by_chips()
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3.2), sharey=False, layout="constrained")
    names = sorted({name for lines in found.values() for name in lines})
    colors = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    for axis, (model, lines) in zip(axes, found.items(), strict=True):
        for name, points in sorted(lines.items()):
            axis.loglog(*zip(*points, strict=True), marker="o", markersize=3, color=colors[name], label=name, base=2)
        axis.set_title(model)
        axis.set_xlabel("chips v5p")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds a token")
    handles = [plt.Line2D([], [], color=color, marker="o", markersize=3) for color in colors.values()]
    figure.legend(handles, colors, loc="outside lower center", ncols=len(colors), title="the innermost that is split")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def published() -> str:
    """Estimates beside figures that others published."""
    rows = [["model", "on", "figure", "published", "estimate at peaks", "layout"]]
    for config, name, topology, figure, value, batch in (
        (LLAMA_70B, "Llama 2 70B", "v5p:4x4x4", "MFU, MaxText", "65 %", 64 * 4),
        (mx.PRESETS["8x7b"], "Mixtral 8x7B", "v5p:4x4x4", "MFU, MaxText", "53 %", 64 * 4),
        (mx.PRESETS["8x7b"], "Mixtral 8x7B", "v6e:8x8", "MFU, MaxText", "35 %", 64 * 4),
    ):
        try:
            best = rank(config, topology=topology, objective="train", batch=batch, train=Training(seq=4096)).best[0]
        except mx.InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        rows.append([name, topology, figure, value, f"{best.utilization:.0%}", f"`{best.label}`"])
    ranking = rank(LLAMA_70B, topology="v5e:4x4", objective="latency", batch=1, kv_seq=2048, quantize=mx.Int8())
    best = ranking.best[0]
    share = best.times.memory / best.seconds
    rows.append(
        ["Llama 2 70B, int8", "v5e:4x4", "HBM bandwidth, jax-llm-examples", "85 %", f"{share:.0%}", f"`{best.label}`"]
    )
    return table(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put tables and plots into docs/which_layout.md")
    arguments = parser.parse_args()
    use_cpu()
    stages = staged()
    for name, block in {"chosen": chosen(), "staged": table(stages), "published": published()}.items():
        if arguments.write:
            write(block, name, PAGE)
        else:
            print(f"{block}\n")
    if arguments.write:
        plot(DOCS / "which_layout_latency.png")
        plot_stages(stages, DOCS / "which_layout_train.png")


if __name__ == "__main__":
    main()
