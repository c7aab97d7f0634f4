"""How much of a GPU or a TPU do decoding, prefill and training use, here and with transformers?

Each model has random weights of its preset's shape, made on the device: the time of a program does not depend on them.
Weights and cache are in bfloat16; training keeps weights and moments in float32 and multiplies in bfloat16.

    python benchmarks/accelerator.py --json accelerator.json
    python benchmarks/accelerator.py --write

The second puts the table into the README beside this file. transformers takes part where torch sees the same device.
Each contender runs in a process of its own, once a round: no other program may use the device. To try the script
without a device:

    python benchmarks/accelerator.py --cpu --model gpt-nano --prompt 32 --new-tokens 8 --seq 32 --rounds 1
"""

import dataclasses
import functools
import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

from rounds import (
    footnote,
    how_often,
    in_own_process,
    in_rounds,
    keep,
    make_report,
    options,
    pooled,
    positive,
    spread,
    table,
    timed,
    use_cpu,
)


# What one weight takes in memory: in bfloat16; and in training its float32 value, gradient and two moments, and its
# bfloat16 copy.
BYTES_TO_GENERATE, BYTES_TO_TRAIN = 2, 18
# Of the memory, for all weights. The rest is for activations, the cache and the programs.
SHARE_OF_MEMORY = 0.75
LEARNING_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Peak:
    """The figures of a device, from its maker's page.

    **Attributes:**

    - `flops`: dense operations a second on bfloat16, added up in float32.
    - `bandwidth`: bytes a second between the device and its memory.
    - `source`: the page.
    """

    flops: float
    bandwidth: float
    source: str


_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
# By JAX's `device_kind`. The pages of NVIDIA give operations on sparse matrices, which are twice those on dense ones,
# but for the A100's, which gives both.
GPUS = {
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1555e9, _NVIDIA + "a100/"),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2039e9, _NVIDIA + "a100/"),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 1935e9, _NVIDIA + "a100/"),
    "NVIDIA H100 80GB HBM3": Peak(989.5e12, 3350e9, _NVIDIA + "h100/"),
    "NVIDIA H200": Peak(989.5e12, 4800e9, _NVIDIA + "h200/"),
    "NVIDIA L4": Peak(121e12, 300e9, _NVIDIA + "l4/"),
    "NVIDIA L40S": Peak(362e12, 864e9, _NVIDIA + "l40s/"),
}
# The figures and sources of these are those of `mistral_eqx.planning.CHIPS`.
TPUS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What both contenders for a model are given.

    **Attributes:**

    - `config`: the model, a [`mistral_eqx.MistralConfig`][].
    - `platform`: of the device in JAX, such as `"gpu"`.
    - `batch`, `prompt`, `new_tokens`: rows, and for each of them the lengths; for a step of training, `prompt` is the
        number of tokens that are read.
    - `repetitions`: measurements in one process.
    """

    config: Any
    platform: str
    batch: int
    prompt: int
    new_tokens: int
    repetitions: int

    def rows(self, length: int) -> list[list[int]]:
        """Random tokens, the same for everyone."""
        import numpy as np

        return np.random.default_rng(0).integers(3, self.config.vocab, (self.batch, length)).tolist()


# ---- the device ----


def describe_device() -> dict[str, Any]:
    """What JAX says of the first device, in the process that calls this."""
    import jax
    import psutil

    device = jax.devices()[0]
    known = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_bytes": known.get("bytes_limit", psutil.virtual_memory().available),
    }


def torch_sees(platform: str) -> bool:
    """Whether torch and transformers are installed and compute on the same device."""
    if platform == "tpu" or any(importlib.util.find_spec(module) is None for module in ("torch", "transformers")):
        return False
    import torch

    return platform == "cpu" or torch.cuda.is_available()


def find_peak(kind: str) -> Peak | None:
    """The figures of a kind of device, if they are known."""
    from mistral_eqx.planning import CHIPS

    if kind in TPUS:
        chip = CHIPS[TPUS[kind]]
        return Peak(chip.flops, chip.hbm_bandwidth, chip.source)
    return GPUS.get(kind)


def fitted(config: Any, bytes_each: int, memory: int) -> Any:
    """The model with as many of its layers as its share of the memory holds.

    **Arguments:**

    - `bytes_each`: what one weight takes.
    - `memory`: the bytes of the device.
    """
    room = SHARE_OF_MEMORY * memory / bytes_each
    one, two = (dataclasses.replace(config, layers=n, windows=(None,) * n).parameters for n in (1, 2))
    layers = min(config.layers, 1 + math.floor((room - one) / (two - one)))
    if layers < 1:
        sys.exit(
            f"One layer of the model takes {bytes_each * one / 1e9:.1f} GB, but the device has "
            f"{memory / 1e9:.1f} GB of memory; choose a smaller model with --model."
        )
    return dataclasses.replace(config, layers=layers, windows=config.windows[:layers])


def needed(config: Any, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """The FLOPs of prefill and the bytes that a step of decoding reads, as the planner counts them."""
    import mistral_eqx as mx

    report = mx.plan(config, devices=1, batch=batch, prompt=prompt, kv_seq=prompt + new_tokens, dtype="bfloat16")
    read, decode = report["prefill"], report["decode"]
    # Each step reads all weights and the cache, but of a table of its own for the embedding only a few rows.
    table_bytes = 0 if config.tied else 2 * config.vocab * config.embed
    return {
        "prefill_flops": read.runs * read.flops,
        "decode_bytes": decode.memory.weights - table_bytes + decode.memory.cache,
    }


# ---- generation ----

Generate = Callable[[int], Any]


def start_generating_here(task: Task) -> Generate:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import mistral_eqx as mx

    init = eqx.filter_jit(functools.partial(mx.Mistral.init, task.config, dtype=jnp.bfloat16))
    model, rows = jax.block_until_ready(init(key=jax.random.key(0))), task.rows(task.prompt)
    return lambda new: jax.block_until_ready(mx.generate(model, rows, max_new_tokens=new, eos_id=()).tokens)


def start_generating_transformers(task: Task) -> Generate:
    import torch

    model = _transformers(task, torch.bfloat16).eval()
    ids = torch.tensor(task.rows(task.prompt), device=model.device)
    mask = torch.ones_like(ids)

    def generate(new: int) -> Any:
        # The tokens come to the host, which waits for the device.
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False).cpu()

    return generate


def measure_generating(start: Callable[[Task], Generate], task: Task) -> dict[str, Any]:
    """One contender in one round: the rates of prefill and of decoding, without the first calls, which compile."""
    generate = start(task)
    for new in (1, task.new_tokens) * 2:
        generate(new)
    pairs = [(timed(generate, 1)[0], timed(generate, task.new_tokens)[0]) for _ in range(task.repetitions)]
    prefill = statistics.median(first for first, _ in pairs)
    return {
        "prefill": [task.batch * task.prompt / first for first, _ in pairs],
        "decode": [task.batch * (task.new_tokens - 1) / (whole - prefill) for _, whole in pairs],
    }


# ---- training ----

# Makes a step, and returns when it is done.
Step = Callable[[], Any]


def start_training_here(task: Task) -> tuple[Step, float]:
    import equinox as eqx
    import jax

    import mistral_eqx as mx

    optimizer = mx.train.adamw(LEARNING_RATE)
    init = eqx.filter_jit(functools.partial(mx.Mistral.init, task.config, dtype="bfloat16"))
    state = mx.train.TrainState.init(init(key=jax.random.key(0)), optimizer)
    batch = mx.train.one_a_row([mx.train.causal(row) for row in task.rows(task.prompt + 1)], task.prompt)
    make = mx.train.make_step(optimizer, compute_dtype="bfloat16", clip=1.0, remat="block")
    flops = mx.train.flops_per_token(state.model, task.prompt)

    def step() -> Any:
        nonlocal state
        state, metrics = jax.block_until_ready(make(state, batch))
        return metrics

    return step, flops


def start_training_transformers(task: Task) -> tuple[Step, None]:
    import torch

    model = _transformers(task, torch.float32).train()
    # The same rematerialisation policy: of each block its input is kept.
    model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    rows = torch.tensor(task.rows(task.prompt + 1), device=model.device)
    ids, targets = rows[:, :-1], rows[:, 1:].contiguous()

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    return step, None


def measure_training(start: Callable[[Task], tuple[Step, float | None]], task: Task) -> dict[str, Any]:
    """One contender in one round: the rate of training, without the first two steps, of which one compiles."""
    step, flops = start(task)
    step()
    step()
    seconds = [timed(step)[0] for _ in range(task.repetitions)]
    return {"train": [task.batch * task.prompt / one for one in seconds], "flops_per_token": flops}


def _transformers(task: Task, dtype: Any) -> Any:
    """A model of the same shape with random weights, on the device."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    config = task.config
    shape = transformers.MistralConfig(
        vocab_size=config.vocab,
        hidden_size=config.embed,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.q_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        sliding_window=None,
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.device("cpu" if task.platform == "cpu" else "cuda"):
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


STARTS = {
    "mistral_eqx": (start_generating_here, start_training_here),
    "transformers": (start_generating_transformers, start_training_transformers),
}


def measure(kind: str, start: Callable[[Task], Any], task: Task) -> dict[str, Any]:
    """Generates or trains; where the memory of the device does not suffice, it says so."""
    try:
        return measure_generating(start, task) if kind == "generate" else measure_training(start, task)
    except RuntimeError as error:
        # Both libraries have an error of their own for this, derived from RuntimeError.
        if not any(words in str(error).lower() for words in ("out of memory", "resource_exhausted")):
            raise
        return {"out_of_memory": str(error).partition("\n")[0]}


def tell(found: dict[str, Any]) -> str:
    rates = (
        f"{name} {statistics.median(found[name]):.1f} tokens/s"
        for name in ("decode", "prefill", "train")
        if name in found
    )
    return ", ".join(rates) or "out of memory"


# ---- the table ----


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    peak, measured = report["peak"], report["measured"]
    lines = [["", "decode, tokens/s", "of the bandwidth", "prefill, tokens/s", "MFU", "training, tokens/s", "MFU"]]
    for model, figures in report["figures"].items():
        for library in report["libraries"]:
            made = measured[f"{model}, {library}, generate"]
            trained = measured[f"{model}, {library}, train"]
            # A step of decoding gives a token to each row.
            lines.append(
                [
                    f"{model}, {library}",
                    *_cells(made, "decode", figures["decode_bytes"] / report["batch"], peak and peak["bandwidth"]),
                    *_cells(made, "prefill", figures["prefill_flops_per_token"], peak and peak["flops"]),
                    *_cells(trained, "train", figures["train_flops_per_token"], peak and peak["flops"]),
                ]
            )
    device = f"One {report['device']['kind']}"
    if peak is None:
        device += ", whose peaks are not known"
    else:
        device += f", {peak['flops'] / 1e12:g} TFLOP/s and {peak['bandwidth'] / 1e9:g} GB/s ({peak['source']})"
    how = (
        f"Prompts: {report['batch']} of {report['prompt']} tokens, {report['new_tokens']} new ones each; training: "
        f"{report['train_batch']} rows of {report['seq']} tokens a step; {how_often(report)}"
    )
    smaller = [
        f"{model} has {figures[layers]} of its {figures['layers']} layers to {work}: the memory holds no more."
        for model, figures in report["figures"].items()
        for work, layers in (("generate", "generate_layers"), ("train", "train_layers"))
        if figures[layers] < figures["layers"]
    ]
    return f"{table(lines)}\n\n{footnote(report, device + '.', how, *smaller)}"


def _cells(found: list[dict[str, Any]], name: str, cost: float | None, peak: float | None) -> list[str]:
    """The rate, and the share of the peak that it takes at this cost a token, where both are known."""
    if any("out_of_memory" in one for one in found):
        return ["out of memory", ""]
    rates = pooled(found, name)
    known = cost is not None and peak is not None
    return [spread(rates, 1), f"{statistics.median(rates) * cost / peak:.1%}" if known else ""]


def main():
    parser = options(__doc__)
    parser.add_argument("--model", nargs="+", default=["smollm2-135m", "7b-v0.3"], help="presets (%(default)s)")
    parser.add_argument("--batch", type=positive, default=1, help="prompts that are continued together (1)")
    parser.add_argument("--prompt", type=positive, default=1024, help="the length of each prompt (1024)")
    parser.add_argument("--new-tokens", type=positive, default=128, help="tokens to decode after each (128)")
    parser.add_argument("--train-batch", type=positive, default=4, help="rows of a step of training (4)")
    parser.add_argument("--seq", type=positive, default=1024, help="tokens of each of these rows (1024)")
    parser.add_argument("--flops", type=float, help="of the device, operations a second on bfloat16, such as 989e12")
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, bytes a second, such as 3.35e12")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, to try the script")
    arguments = parser.parse_args()
    if arguments.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the rate is taken over the tokens after the first.")
    if (arguments.flops is None) != (arguments.bandwidth is None):
        parser.error("--flops and --bandwidth belong together; give both or none.")
    if arguments.cpu:
        use_cpu()
    else:
        os.environ |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "HF_HUB_OFFLINE": "1"}
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    # In another process: a TPU serves one at a time, and this one must leave it to the contenders.
    device = in_own_process(describe_device)
    if device["platform"] == "cpu" and not arguments.cpu:
        parser.exit(2, "JAX sees no GPU and no TPU here; to try this script on the CPU, give --cpu --model gpt-nano.\n")

    import mistral_eqx as mx

    unknown = [name for name in arguments.model if name not in mx.PRESETS]
    if unknown:
        parser.error(f"There is no preset {unknown[0]!r}; --model takes {', '.join(mx.PRESETS)}.")
    most = min(mx.PRESETS[name].max_positions for name in arguments.model)
    if max(arguments.prompt + arguments.new_tokens, arguments.seq) > most:
        parser.error(f"The context is {most} tokens; --prompt with --new-tokens, and --seq, must fit into it.")
    peak = find_peak(device["kind"])
    if arguments.flops is not None:
        peak = Peak(arguments.flops, arguments.bandwidth, "as given")
    libraries = ["mistral_eqx"]
    if in_own_process(torch_sees, device["platform"]):
        libraries.append("transformers")
    else:
        print("Left out: transformers, because torch does not see the device or is not installed.", file=sys.stderr)
    figures, contenders = {}, {}
    for name in arguments.model:
        generated = fitted(mx.PRESETS[name], BYTES_TO_GENERATE, device["memory_bytes"])
        trained = fitted(mx.PRESETS[name], BYTES_TO_TRAIN, device["memory_bytes"])
        tasks = {
            "generate": Task(
                generated,
                device["platform"],
                arguments.batch,
                arguments.prompt,
                arguments.new_tokens,
                arguments.repetitions,
            ),
            "train": Task(trained, device["platform"], arguments.train_batch, arguments.seq, 0, arguments.repetitions),
        }
        counted = needed(generated, arguments.batch, arguments.prompt, arguments.new_tokens)
        figures[name] = {
            "layers": mx.PRESETS[name].layers,
            "generate_layers": generated.layers,
            "train_layers": trained.layers,
            "decode_bytes": counted["decode_bytes"],
            "prefill_flops_per_token": counted["prefill_flops"] / (arguments.batch * arguments.prompt),
        }
        for library in libraries:
            for (work, task), start in zip(tasks.items(), STARTS[library], strict=True):
                contenders[f"{name}, {library}, {work}"] = (work, start, task)
    measured, others = in_rounds(measure, contenders, arguments.rounds, tell)
    for name, known in figures.items():
        known["train_flops_per_token"] = measured[f"{name}, mistral_eqx, train"][0].get("flops_per_token")
    report = make_report(
        arguments,
        measured,
        others,
        device=device,
        peak=None if peak is None else dataclasses.asdict(peak),
        libraries=libraries,
        figures=figures,
    )
    keep(report, markdown(report), "accelerator", arguments)
    print(markdown(report))


if __name__ == "__main__":
    main()
