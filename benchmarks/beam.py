"""How fast is beam search here, with transformers, and with a cache that is gathered by beam at each step?

All search with the weights of the preset `smollm2-135m`, in float32 and rounded to bfloat16, from the same prompts, and
no text ends early. The last contender is this package's own search but for the cache: every beam has a row of its own,
prompt and all, and after each step the rows are put in the order of the beams that go on.

    python benchmarks/beam.py --json beam.json
    python benchmarks/beam.py --write

The second puts the table into the README beside this file. transformers takes part if it is installed, and not in the
long search. Each contender runs in a process of its own, once a round; run nothing beside it.
"""

import dataclasses
import importlib.util
import statistics
import sys
from collections.abc import Callable
from typing import Any

from rounds import (
    TIMES,
    Weights,
    exported_weights,
    footnote,
    how_often,
    in_rounds,
    keep,
    load_transformers,
    make_report,
    options,
    prompt_ids,
    spread,
    table,
    timed,
    use_cpu,
)


BEAMS = 5

Search = Callable[[list[list[int]], int], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender is given.

    **Attributes:**

    - `weights`: the files.
    - `searches`: the prompts and the number of new tokens of each search.
    - `repetitions`: how often each is measured in one process.
    """

    weights: Weights
    searches: list[tuple[list[list[int]], int]]
    repetitions: int


def start_mistral_eqx(task: Task, dtype: str | None) -> Search:
    import numpy as np

    import mistral_eqx as mx

    model = mx.load(task.weights.file, dtype=dtype)

    def search(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        best = mx.beam_search(model, prompts, num_beams=BEAMS, max_new_tokens=new_tokens, eos_id=())
        return np.asarray(best.tokens)[:, 0].tolist()

    return search


def start_gathered(task: Task, dtype: str) -> Search:
    """The same search with a row of the cache for each beam, and all rows gathered after each step."""
    import importlib

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    import mistral_eqx as mx
    from mistral_eqx.generation.caches import capacity, empty_cache, grow
    from mistral_eqx.generation.prompt import pad_left
    from mistral_eqx.generation.reading import prompt_width, read_chunks
    from mistral_eqx.nn import Cache

    beam = importlib.import_module("mistral_eqx.generation.beam")
    model = mx.load(task.weights.file, dtype=dtype)

    @eqx.filter_jit(donate="all-except-first")
    def extend(kept, cache):
        model, search, rules, until = kept
        batch, beams = search.scores.shape
        itself = jnp.broadcast_to(jnp.eye(beams, dtype=bool)[None], (batch, beams, beams))

        def step(carry):
            search, cache = carry
            positions = jnp.repeat(search.position, beams)[:, None]
            hidden, cache = model.hidden(search.token.reshape(-1, 1), positions, cache)
            logits = model.logits(hidden).reshape(batch, beams, -1)
            # A search reorders `mask` by beam: here that tells which row each beam came from.
            search = dataclasses.replace(search, mask=itself).advance(logits, rules, model.strategy)
            parent = jnp.argmax(search.mask, axis=2) + beams * jnp.arange(batch)[:, None]
            layers, known = jax.tree.map(lambda x: x[parent.reshape(-1)], (cache.layers, cache.positions))
            return search, Cache(layers, known, cache.used)

        return lax.while_loop(lambda carry: (carry[0].step < until) & carry[0].unfinished, step, (search, cache))

    @eqx.filter_jit
    def first(model, logits, position, rules):
        batch, vocab = logits.shape
        search = beam.Search.init(position, position < 0, BEAMS, rules.divisors.shape[0], BEAMS)
        mask = jnp.broadcast_to(jnp.eye(BEAMS, dtype=bool)[None], (batch, BEAMS, BEAMS))
        logits = jnp.broadcast_to(logits[:, None], (batch, BEAMS, vocab))
        return dataclasses.replace(search, mask=mask).advance(logits, rules, model.strategy)

    def search(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        rules = beam.Rules.init(np.zeros(0, np.int32), capacity(new_tokens), new_tokens, 1.0, False)
        ids, positions = pad_left(prompts, prompt_width(max(map(len, prompts))))
        cache = empty_cache(model, len(prompts), ids.shape[1])
        logits, cache = read_chunks(model, ids, positions, cache, 512)
        state = first(model, logits, positions[:, -1], rules)
        # All beams go on from the prompt's keys and values: no row is another's yet.
        room = capacity(ids.shape[1] + min(new_tokens, 128))
        cache = grow(model, cache, room, BEAMS)
        while (step := int(state.step)) < new_tokens:
            used = int(cache.used)
            if used == room:
                room = min(2 * room, capacity(used + new_tokens - step))
                cache = grow(model, cache, room)
            until = np.asarray(min(new_tokens, step + room - used), np.int32)
            state, cache = extend((model, state, rules, until), cache)
        return np.asarray(state.finished_tokens)[:, 0, :new_tokens].tolist()

    return search


def start_transformers(task: Task, dtype: str) -> Search:
    import torch

    model = load_transformers(task.weights.folder, dtype)

    def search(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, num_beams=BEAMS, do_sample=False)
        return whole[:, width:].tolist()

    return search


STARTS = {"transformers": start_transformers, "mistral_eqx": start_mistral_eqx, "gathered cache": start_gathered}
CONTENDERS = [(name, dtype) for dtype in ("float32", "bfloat16") for name in STARTS]


def measure(name: str, dtype: str | None, task: Task) -> dict[str, Any]:
    """One contender in one round: for each search its seconds, those of the first call, and the texts."""
    search = STARTS[name](task, dtype)
    found: dict[str, Any] = {"seconds": [], "first_call": [], "texts": []}
    for prompts, new_tokens in task.searches:
        if name == "transformers" and new_tokens > 64:
            continue
        (first, texts), *others = (timed(search, prompts, new_tokens) for _ in range(1 + task.repetitions))
        found["first_call"].append(first)
        found["seconds"].append([seconds for seconds, _ in others])
        found["texts"].append(texts)
    return found


def tell(found: dict[str, Any]) -> str:
    return " ".join(f"{statistics.median(seconds):7.2f} s" for seconds in found["seconds"])


def summary(measured: dict[str, list[dict[str, Any]]], contenders: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Medians over all repetitions of all rounds, and their ratios."""
    rows = []
    for (name, dtype), found in zip(contenders, measured.values(), strict=True):
        count = len(found[0]["seconds"])
        seconds = [[second for one in found for second in one["seconds"][at]] for at in range(count)]
        row = {"name": name, "dtype": dtype, "seconds": seconds, "texts": found[0]["texts"]}
        row["first_call"] = [statistics.median(one["first_call"][at] for one in found) for at in range(count)]
        row["peak_bytes"] = max(one["peak_bytes"] for one in found)
        rows.append(row)
    for row in rows:
        medians = [statistics.median(seconds) for seconds in row["seconds"]]
        row["times"] = {}
        for other in rows:
            if other["name"] != row["name"] and other["dtype"] == row["dtype"]:
                pairs = zip(other["seconds"], medians, strict=False)
                row["times"][other["name"]] = [statistics.median(theirs) / mine for theirs, mine in pairs]
        (reference, *_) = [other for other in rows if other["dtype"] == "float32"]
        texts = zip(row["texts"], reference["texts"], strict=False)
        row["equal"] = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in texts]
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    cases = [f"batch {batch}, {new} tokens, s" for batch, new in report["searches"]]
    header = ["", *(cell for case in cases for cell in (case, f"{TIMES} transformers", f"{TIMES} gathered"))]
    lines = [[*header, "equal texts", "peak, GB"]]
    for row in report["rows"]:
        cells = [f"{row['name']} {row['dtype']}"]
        for at in range(len(cases)):
            if at >= len(row["seconds"]):
                cells += [""] * 3
                continue
            cells.append(spread(row["seconds"][at], 2))
            for other in ("transformers", "gathered cache"):
                ratios = row["times"].get(other, []) if row["name"] == "mistral_eqx" else []
                cells.append(f"{ratios[at]:.2f}" if at < len(ratios) else "")
        texts = sum(batch for batch, _ in report["searches"][: len(row["equal"])])
        lines.append([*cells, f"{sum(row['equal'])} of {texts}", f"{row['peak_bytes'] / 1e9:.2f}"])
    return f"{table(lines)}\n\n{footnote(report, f'{BEAMS} beams; {how_often(report)}')}"


def main():
    parser = options(__doc__)
    parser.add_argument("--long", type=int, default=1024, help="new tokens of the long search, 0 for none (1024)")
    arguments = parser.parse_args()
    use_cpu()
    ids = prompt_ids()
    prompts = [ids[:32], ids[40:64]]
    searches = [(prompts[:1], 64), (prompts, 64)]
    if arguments.long:
        searches.append((prompts[:1], arguments.long))
    contenders = list(CONTENDERS)
    if any(importlib.util.find_spec(module) is None for module in ("torch", "transformers")):
        print("Left out: transformers, because it or torch is not installed.", file=sys.stderr)
        contenders = [contender for contender in contenders if contender[0] != "transformers"]
    with exported_weights() as weights:
        task = Task(weights, searches, arguments.repetitions)
        starts = {" ".join(contender): (*contender, task) for contender in contenders}
        measured, others = in_rounds(measure, starts, arguments.rounds, tell)
    report = make_report(
        arguments,
        measured,
        others,
        searches=[(len(prompts), new_tokens) for prompts, new_tokens in searches],
        rows=summary(measured, contenders),
    )
    keep(report, markdown(report), "beam", arguments)
    print(markdown(report))
    ours = next(row for row in report["rows"] if row["name"] == "mistral_eqx" and row["dtype"] == "float32")
    if sum(ours["equal"][:2]) < 3:
        sys.exit("mistral_eqx float32 found other texts than the reference did: two different searches were measured.")


if __name__ == "__main__":
    main()
