"""Plans: a model and a strategy, compiled for devices that are not here."""

import dataclasses
import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh

from ..checks import CacheDType, Count, checked
from ..config import MistralConfig
from ..errors import InputError
from ..parallel import Choice, Strategy, read_strategy, strategies
from ..parallel.mesh import parse_axes, show
from ..quant import Recipe
from ..train import Zero
from .arguments import DTypes, chip_of, count_devices, lengths_of, named
from .limits import roofline
from .programs import Job
from .ranking import Objective, rank
from .report import Report, read_phase
from .shapes import bytes_by_format, model_shapes
from .training import Training


def plan(
    model: MistralConfig | str,
    *,
    topology: str | None = None,
    devices: int | None = None,
    strategy: Strategy | Choice | str = "heads",
    mesh: str | Mapping[str, int] | None = None,
    objective: Objective = "latency",
    batch: int | None = None,
    prompt: int | None = None,
    kv_seq: int | None = None,
    dtype: str = "bfloat16",
    cache_dtype: CacheDType | None = None,
    quantize: Recipe | None = None,
    train: Training | bool = False,
) -> Report:
    """Compiles a model for devices that are not here, and reports the memory and the work of each of them.

    ```python
    report = mx.plan("7b-v0.2", topology="v4:2x2x4", strategy="kv_replicated", batch=8, kv_seq=4096)
    rich.print(report.table())
    ```

    A separate process compiles the functions of `generate`, or of a training step, ahead of time, on shapes in place of
    weights: nothing of the model's size is allocated. This takes seconds to a minute, and some minutes for training.

    **Arguments:**

    - `model`: a config, or the name of a preset.
    - `topology`: a chip of `mistral_eqx.planning.CHIPS` and the number of chips along each side, such as
        `"v4:2x2x4"`. It needs the extra `tpu`, but no TPU.
    - `devices`: in place of a topology, a number of virtual CPU devices.
    - `strategy`: a strategy, its name, its name with further entries (`"heads batch@dp"`), its text, or one of
        `mx.strategies`; or `"best"`, the one that [`mistral_eqx.planning.rank`][] puts first.
    - `mesh`: the sizes of the mesh axes, such as `"kv=8,rep=2"`. Unless given, the first mesh that fits the strategy.
    - `objective`: for `"best"`, by what: `"latency"` or `"throughput"`; with `train` it is the time of a step.
    - `batch`: the number of rows, over all devices; unless given, 8, or for `"best"` what `rank` takes.
    - `prompt`: the number of tokens of each prompt, which chunked prefill reads as in `generate`; unless given, 512, or
        half of the cache if that is less.
    - `kv_seq`: the number of slots of each row in the cache, which bounds prompt and new tokens together; unless given,
        4096, or the model's context if that is less.
    - `dtype`: the precision of weights, activations and cache; in training, of the forward and the backward pass.
    - `cache_dtype`: the codes of the cache, as in [`mistral_eqx.generate`][]; by default it has floats.
    - `quantize`: a scheme or a recipe, as for [`mistral_eqx.quantize`][]; by default all weights are floats. A scheme
        of your own must be in a module that another process can import.
    - `train`: plans a training step in place of generation: [`mistral_eqx.planning.Training`][], or `True` for its
        defaults.

    **Returns:** the report.

    **Raises:** `ValueError` if a name or a size is wrong, the strategy does not fit the model or the devices or cuts
    blocks of a quantized weight, or libtpu is not installed or does not know the topology; `RuntimeError` if the
    compiler fails.
    """
    config, name = named(model)
    checked(dtype, DTypes, "dtype")
    checked(cache_dtype, CacheDType | None, "cache_dtype")
    count, chip = count_devices(topology, devices), None if topology is None else chip_of(topology)
    if chip is not None and chip.switched is not None:
        raise InputError(
            f"Programs are compiled for TPUs, not for GPUs such as {chip.name}; rank layouts with "
            "mistral_eqx.planning.rank or --strategy best."
        )
    training = Training() if train is True else train or None
    if training is None:
        prompt, kv_seq = lengths_of(config, prompt, kv_seq)
    elif (prompt, kv_seq, cache_dtype) != (None, None, None):
        raise InputError(
            "Training has no prompt and no cache; leave out prompt, kv_seq and cache_dtype, and set train's seq."
        )
    elif quantize is not None:
        raise InputError("A training step has float weights, and quantize is given; leave it out.")
    else:
        prompt = kv_seq = 0
    if strategy == "best":
        if topology is None or mesh is not None:
            raise InputError("The best strategy is that for a chip, with its mesh; give a topology, and no mesh.")
        lengths = {} if training is not None else {"prompt": prompt, "kv_seq": kv_seq}
        sizes = {"batch": batch, "dtype": dtype, "cache_dtype": cache_dtype, "quantize": quantize, "train": training}
        goal = objective if training is None else "train"
        first = rank(model, topology=topology, objective=goal, **lengths, **sizes).best[0]
        strategy, batch = first.choice, first.batch
        training = first.training
    total: int = checked(8 if batch is None else batch, Count, "batch")
    label, split, axes = _strategy_and_axes(config, strategy, mesh, count)
    rows = split.parts("batch", axes)
    if total % rows:
        raise InputError(f"A batch of {total} cannot be split over {rows} devices; take a multiple of {rows}.")
    if training is not None:
        _check_training(config, training, split, axes, total, rows)
    if chip is not None and importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "Compiling for a TPU needs libtpu, which is not installed; run pip install 'mistral-eqx[tpu]', or plan "
            "for virtual devices."
        )
    formats = {}
    if quantize is not None:
        shape = AbstractMesh(tuple(axes.values()), tuple(axes))
        platform = "cpu" if topology is None else "tpu"
        formats = bytes_by_format(model_shapes(config, dtype, split, shape, platform, quantize))
    job = Job(
        config, topology, count, split.layout, axes, total, prompt, kv_seq, dtype, cache_dtype, training, quantize
    )
    phases = _compiled(job)
    if chip is not None:
        phases = [
            phase
            if phase.refused is not None
            else dataclasses.replace(
                phase, roofline=roofline(chip, phase.flops, float(phase.hbm_bytes), phase.exchanges)
            )
            for phase in phases
        ]
    return Report(
        model=name,
        parameters=config.parameters,
        place=topology or f"{count} virtual devices",
        devices=count,
        chip=chip,
        strategy=label,
        layout=split.layout,
        axes=axes,
        batch=total,
        prompt=prompt,
        kv_seq=kv_seq,
        dtype=dtype,
        phases=tuple(phases),
        cache_dtype=cache_dtype,
        training=training,
        formats=formats,
    )


def _check_training(
    config: MistralConfig, training: Training, split: Strategy, axes: dict[str, int], batch: int, rows: int
):
    Zero.init(training.zero, AbstractMesh(tuple(axes.values()), tuple(axes)), split)
    training.check_stages(split.parts("layers", axes))
    if batch % (training.accumulate * rows):
        raise InputError(
            f"A batch of {batch} cannot be split into {training.accumulate} micro-batches on each of {rows} devices; "
            f"take a multiple of {training.accumulate * rows}."
        )
    if training.seq > config.max_positions:
        raise InputError(
            f"seq is {training.seq} and the model's context is {config.max_positions} tokens; take a shorter seq."
        )


def _strategy_and_axes(
    config: MistralConfig, strategy: Strategy | Choice | str, mesh: str | Mapping[str, int] | None, count: int
) -> tuple[str, Strategy, dict[str, int]]:
    """The strategy's name, the strategy, and the axes of its mesh."""
    if isinstance(strategy, Choice):
        label, split = strategy.name, strategy.strategy
        axes = strategy.axes if mesh is None else parse_axes(mesh)
    else:
        split = read_strategy(strategy) if isinstance(strategy, str) else strategy
        label = split.name
        axes = _axes(config, split, count) if mesh is None else parse_axes(mesh)
    if math.prod(axes.values()) != count:
        raise InputError(f"The mesh {show(axes)} takes {math.prod(axes.values())} devices and there are {count}.")
    try:
        split.check(config, AbstractMesh(tuple(axes.values()), tuple(axes)))
    except InputError as error:
        fitting = next(iter(strategies(config, count)), None)
        if fitting is None:
            raise
        example = f"strategy={fitting.strategy.name!r} with mesh={show(fitting.axes)!r} fits"
        raise InputError(f"{str(error).rstrip('.')}; {example}.") from error
    return label, split, axes


def _axes(config: MistralConfig, split: Strategy, count: int) -> dict[str, int]:
    """The mesh axes of a strategy, if no mesh is given."""
    for choice in strategies(config, count):
        if choice.strategy.layout == split.layout:
            return choice.axes
    used = split.axes()
    if len(used) > 1:
        raise InputError(
            f"The strategy {split.layout!r} splits over the axes {' and '.join(used)}, and has no default mesh of "
            f"{count} devices; give the size of each axis, such as "
            f"mesh={','.join(f'{axis}=2' for axis in used)!r}."
        )
    return {used[0] if used else "tp": count}


def _compiled(job: Job) -> list[Any]:
    """The phases, compiled in another process."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(job.devices if job.topology is None else 1),
        # The process must neither query nor lock a TPU of this machine.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.worker"],
        input=pickle.dumps(job),
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        errors = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"The compiler failed (exit code {done.returncode}): {errors[-2000:]}")
    answer = json.loads(done.stdout)
    if "refused" in answer:
        raise InputError(answer["refused"])
    return [read_phase(phase) for phase in answer["phases"]]
