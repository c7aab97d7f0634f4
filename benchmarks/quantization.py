"""What does each format of quantization cost, and what does it save?

All formats are made from the weights of the preset `smollm2-135m`, expanded to float32. The script measures size, speed
and memory of each, and how far its predictions are from those of float32, on the beginning of Moby-Dick.

    python benchmarks/quantization.py --json quantization.json
    python benchmarks/quantization.py --write
    python benchmarks/quantization.py --only float32 Q8_0 NF4

The second puts the table into the README beside this file, and two plots into `docs/` (extra `plot`). Each format runs
in a process of its own, once a round.
"""

import dataclasses
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rounds import (
    MODEL,
    footnote,
    how_often,
    in_own_process,
    in_rounds,
    keep,
    make_report,
    new_tokens_option,
    options,
    peak_bytes,
    pooled,
    positive,
    prompt_ids,
    spread,
    table,
    timed,
    use_cpu,
)


ROOT = Path(__file__).parents[1]
BOOK = ROOT / "examples/data/moby-dick.txt"
# More tokens than a layer of the model has inputs. They are from the end of the text, of which the beginning is scored.
CALIBRATION_ROWS, CALIBRATION_TOKENS = 16, 512


@dataclasses.dataclass(frozen=True)
class Format:
    """One row of the table.

    **Attributes:**

    - `recipe`: as for `mistral_eqx.quantize`; `None` for weights that are not quantized anew.
    - `dtype`: as for `mistral_eqx.load`.
    - `cache_dtype`: as for `mistral_eqx.generate`.
    - `calibrated`: whether the recipe needs a text.
    """

    recipe: Any = None
    dtype: str | None = "float32"
    cache_dtype: str | None = None
    calibrated: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What every format is given.

    **Attributes:**

    - `weights`: the preset, or a path.
    - `prompt`: the prompt of a request.
    - `new_tokens`: how many tokens to decode after it.
    - `repetitions`: how many requests are timed, in one process.
    - `scored`: the tokens whose log-probabilities are compared with those of float32.
    - `calibration`: rows of tokens for the formats that need them.
    - `reference`: the file with the log-probabilities of float32, shape `(tokens - 1, vocab)`.
    """

    weights: str | Path
    prompt: list[int]
    new_tokens: int
    repetitions: int
    scored: list[int]
    calibration: list[list[int]]
    reference: Path


def formats() -> dict[str, Format]:
    """All formats by name. Each of a quantized model has the embedding, which is also the head, in Q8_0."""
    import mistral_eqx as mx

    config = mx.PRESETS[MODEL]

    def blocks(scheme: Any, **how: Any) -> Format:
        return Format({"blocks.*": scheme, "embedding": mx.GGUF("Q8_0")}, **how)

    def k_type(kind: str) -> tuple[str, Format]:
        """A type of blocks of 256. They divide the rows of `down_proj` only; the other layers have its substitute."""
        other = mx.quant.fitting_type(kind, config.embed)
        down = {"*.down_proj": mx.GGUF(kind)}
        return f"{kind} + {other}", Format(down | blocks(mx.GGUF(other)).recipe)

    return {
        "float32": Format(),
        "float32, int8 cache": Format(cache_dtype="int8"),
        "float32, FP8 cache": Format(cache_dtype="float8_e4m3"),
        "bfloat16": Format(dtype="bfloat16"),
        "as in the file": Format(dtype=None),
        "Q8_0": blocks(mx.GGUF("Q8_0")),
        **dict(k_type(kind) for kind in ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")),
        "Q4_K_M": Format({"*": mx.GGUF("Q4_K_M")}),
        "Q4_1": blocks(mx.GGUF("Q4_1")),
        "Q4_0": blocks(mx.GGUF("Q4_0")),
        "IQ4_NL": blocks(mx.GGUF("IQ4_NL")),
        "int8": blocks(mx.Int8()),
        "int8, zero-point": blocks(mx.Int8(zero_point=True)),
        "int8, W8A8": blocks(mx.Int8(activations="int8")),
        "LLM.int8()": blocks(mx.Int8(activations="int8", threshold=6.0)),
        "FP8": blocks(mx.FP8()),
        "RTN, 4 bits": blocks(mx.RTN(bits=4, group_size=64)),
        "NF4": blocks(mx.NF4(block_size=64)),
        "GPTQ, 4 bits": blocks(mx.GPTQ(bits=4, group_size=64, act_order=True), calibrated=True),
        "AWQ, 4 bits": blocks(mx.AWQ(bits=4, group_size=64), calibrated=True),
    }


def load(format: Format, task: Task) -> Any:
    """The model in a format."""
    import jax

    import mistral_eqx as mx

    if format.calibrated:
        model = mx.load(task.weights, dtype=format.dtype)
        model = mx.quantize(model, format.recipe, calibration=task.calibration)
    else:
        model = mx.load(task.weights, dtype=format.dtype, quantize=format.recipe)
    return jax.block_until_ready(model)


def bits_a_weight(model: Any) -> float:
    """The bits of all arrays of a model, scales included, for each of its weights."""
    import equinox as eqx
    import jax
    import jax.random as jr

    import mistral_eqx as mx

    dense = eqx.filter_eval_shape(mx.Mistral.init, model.config, key=jr.key(0))
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dense) if hasattr(leaf, "shape"))
    return 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(model) if eqx.is_array(leaf)) / weights


def log_probs(model: Any, ids: list[int], cache_dtype: str | None) -> Any:
    """The log-probabilities of all tokens after each of `ids` but the last, shape `(tokens - 1, vocab)`."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import mistral_eqx as mx

    @eqx.filter_jit
    def run(model: Any, inputs: Any) -> Any:
        cache = mx.nn.Cache.init(model.config, 1, inputs.shape[1], model.dtype, cache_dtype)
        hidden, _ = model.hidden(inputs, cache=cache)
        return jax.nn.log_softmax(model.logits(hidden)[0].astype(jnp.float32))

    return run(model, jnp.asarray([ids[:-1]]))


def save_reference(task: Task):
    """Writes the log-probabilities of float32 into their file."""
    import numpy as np

    np.save(task.reference, np.asarray(log_probs(load(Format(), task), task.scored, None)))


def measure(format: Format, task: Task) -> dict[str, Any]:
    """One format in one round, in the process that calls this; `save_reference` must have run.

    **Returns:** what was measured: a list with one entry a repetition, or a number. `request_peak_bytes` is the peak
    after the last request: the log-probabilities, which are larger than a request, are computed afterwards.
    """
    import jax.numpy as jnp
    import numpy as np

    import mistral_eqx as mx

    def request(new_tokens: int) -> tuple[float, int]:
        seconds, tokens = timed(
            lambda: np.asarray(
                mx.generate(
                    model, [task.prompt], max_new_tokens=new_tokens, eos_id=(), cache_dtype=format.cache_dtype
                ).tokens
            )
        )
        return seconds, tokens.size

    loading, model = timed(load, format, task)
    # The first calls compile.
    _, *pairs = [(request(1)[0], *request(task.new_tokens)) for _ in range(1 + task.repetitions)]
    peak = peak_bytes()
    own, reference = log_probs(model, task.scored, format.cache_dtype), jnp.asarray(np.load(task.reference))
    chosen = jnp.take_along_axis(own, jnp.asarray(task.scored[1:])[:, None], axis=1)
    return {
        "bits_a_weight": bits_a_weight(model),
        "tokens_in": len(task.prompt),
        "tokens_out": pairs[0][2],
        "request_seconds": [whole for _, whole, _ in pairs],
        "decode": [(tokens - 1) / (whole - first) for first, whole, tokens in pairs],
        "request_peak_bytes": peak,
        "load_seconds": loading,
        "perplexity": math.exp(-float(chosen.mean())),
        "kl": float((jnp.exp(reference) * (reference - own)).sum(axis=1).mean()),
    }


def tell(found: dict[str, Any]) -> str:
    return (
        f"{found['bits_a_weight']:5.2f} bits, {statistics.median(found['decode']):6.1f} tokens/s, "
        f"perplexity {found['perplexity']:.2f}, KL {found['kl']:.5f}, loaded in {found['load_seconds']:.1f} s"
    )


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    header = ["format", "model", "bits a weight", "tokens in", "tokens out", "a request, s", "tokens/s", "peak, GB"]
    lines = [[*header, "perplexity", "KL, nats a token", "load and quantize, s"]]
    for name, found in report["measured"].items():
        one = found[0]
        lines.append(
            [
                name,
                MODEL,
                f"{one['bits_a_weight']:.2f}",
                str(one["tokens_in"]),
                str(one["tokens_out"]),
                spread(pooled(found, "request_seconds"), 2),
                spread(pooled(found, "decode"), 1),
                f"{max(one['request_peak_bytes'] for one in found) / 1e9:.2f}",
                f"{one['perplexity']:.2f}",
                # A difference of sums that are equal but for rounding may be less than 0.
                f"{max(one['kl'], 0.0):.5f}",
                f"{statistics.median(one['load_seconds'] for one in found):.1f}",
            ]
        )
    how = f"{report['scored_tokens']} tokens scored; {how_often(report)}"
    return f"{table(lines)}\n\n{footnote(report, how)}"


def draw(report: dict[str, Any], folder: Path):
    """Two plots: the KL divergence by size, and the speed of each format."""
    from matplotlib.figure import Figure

    measured = report["measured"]
    # The inverse of the bits: most formats have few, and are then far apart.
    points = {name: (-1 / found[0]["bits_a_weight"], max(found[0]["kl"], 0.0)) for name, found in measured.items()}
    figure = Figure(figsize=(10, 7), layout="constrained", dpi=110)
    axes = figure.subplots()
    axes.scatter(*zip(*points.values(), strict=True), s=18, zorder=3)
    # Linear up to 1e-4: float32 is at 0.
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set(
        title=f"{MODEL}: size and accuracy of each format",
        xlabel="bits a weight, of the whole model",
        ylabel="KL divergence from float32, nats a token",
    )
    axes.set_ylim(-5e-5, 3 * max(kl for _, kl in points.values()) + 1e-4)
    bits = [4.5, 5, 5.5, 6, 7, 8, 10, 16, 32]
    axes.set_xticks([-1 / one for one in bits], [str(one) for one in bits])
    axes.set_xlim(-1 / 4.5, 0.015)
    axes.grid(alpha=0.3)
    _label(axes, points)
    figure.savefig(folder / "quantization_kl.png")

    figure = Figure(figsize=(9, 1.2 + 0.3 * len(measured)), layout="constrained", dpi=110)
    axes = figure.subplots()
    rates = [statistics.median(pooled(found, "decode")) for found in measured.values()]
    bars = axes.barh(list(measured), rates, 0.7)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set(title=f"{MODEL}: decoding speed of each format", xlabel="tokens/s, one stream")
    axes.margins(x=0.08, y=0.02)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(folder / "quantization_speed.png")


def _label(axes: Any, points: dict[str, tuple[float, float]]):
    """Writes each name near its point, where neither the name nor the line to it covers another name or point."""
    import numpy as np
    from matplotlib.path import Path as Line
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    centres = axes.transData.transform(list(points.values()))
    taken = {name: [Bbox.from_bounds(x - 5, y - 5, 10, 10)] for name, (x, y) in zip(points, centres, strict=True)}
    line = {"arrowstyle": "-", "linewidth": 0.5, "color": "grey", "shrinkA": 0, "shrinkB": 2}
    # The nearest first, in points.
    heights = [0, *(sign * height for height in range(8, 160, 8) for sign in (1, -1))]
    spots = [(x, y) for y in heights for x in (9, -9, 30, -30, 60, -60)]

    def write(name: str, spot: tuple[int, int]) -> Any:
        side = "left" if spot[0] > 0 else "right"
        where = {"xytext": spot, "textcoords": "offset points", "ha": side, "va": "center"}
        return axes.annotate(name, points[name], fontsize=8, **where)

    for name, centre in zip(points, centres, strict=True):
        others = [box for other, boxes in taken.items() if other != name for box in boxes]
        # Equal points are one.
        crossed = [box for box in others if not box.contains(*centre)]

        def free(spot: tuple[int, int], name=name, centre=centre, others=others, crossed=crossed) -> bool:
            label = write(name, spot)
            box = label.get_window_extent()
            label.remove()
            inside = all(axes.bbox.contains(*corner) for corner in box.corners())
            way = Line([centre, centre + np.array(spot) * axes.figure.dpi / 72])
            return inside and not box.count_overlaps(others) and not any(map(way.intersects_bbox, crossed))

        spot = next(filter(free, spots), spots[0])
        taken[name].append(write(name, spot).get_window_extent())
        axes.annotate("", points[name], spot, textcoords="offset points", arrowprops=line)


def main():
    parser = options(__doc__, rounds=1)
    use_cpu()
    every = formats()
    parser.add_argument("--only", nargs="+", choices=every, metavar="NAME", help=f"of {'; '.join(every)}")
    parser.add_argument("--characters", type=positive, default=1500, help="of the book, how many are scored (1500)")
    parser.add_argument("--prompt-tokens", type=positive, default=128, help="the length of the prompt (128)")
    new_tokens_option(parser)
    arguments = parser.parse_args()

    import mistral_eqx as mx

    prompt = prompt_ids()
    if arguments.prompt_tokens > len(prompt):
        parser.error(f"--prompt-tokens must be at most {len(prompt)}, as long as the text in prompt.txt is.")
    ids = mx.load_tokenizer(MODEL).encode(BOOK.read_text(encoding="utf-8"))
    scored = mx.load_tokenizer(MODEL).encode(BOOK.read_text(encoding="utf-8")[: arguments.characters])
    rest = ids[-CALIBRATION_ROWS * CALIBRATION_TOKENS :]
    if len(scored) + len(rest) > len(ids):
        parser.error("--characters is so large that the end of the book, which calibrates, would be scored; take less.")
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        task = Task(
            weights=MODEL,
            prompt=prompt[: arguments.prompt_tokens],
            new_tokens=arguments.new_tokens,
            repetitions=arguments.repetitions,
            scored=scored,
            calibration=[rest[at : at + CALIBRATION_TOKENS] for at in range(0, len(rest), CALIBRATION_TOKENS)],
            reference=Path(folder) / "float32.npy",
        )
        in_own_process(save_reference, task)
        chosen = {name: (format, task) for name, format in every.items() if name in (arguments.only or every)}
        measured, others = in_rounds(measure, chosen, arguments.rounds, tell)
    report = make_report(arguments, measured, others, scored_tokens=len(scored) - 1)
    keep(report, markdown(report), "quantization", arguments)
    if arguments.write:
        draw(report, ROOT / "docs")
    print(markdown(report))


if __name__ == "__main__":
    main()
