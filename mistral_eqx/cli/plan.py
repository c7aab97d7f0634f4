"""`mistral-eqx plan`: memory, communication and time of a model on devices that are not here."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import interrupts
from ..checks import Count
from ..errors import InputError
from . import options
from .console import stdout_console
from .options import within


# Of the layouts that --strategy best finds.
_COMPILED = 3

if TYPE_CHECKING:
    from ..config import MistralConfig
    from ..parallel import Choice
    from ..planning import Ranking, Training
    from ..quant import AbstractScheme


def plan(
    model: Annotated[str, typer.Argument(help="A preset, such as '7b-v0.2', or a checkpoint to take the sizes of.")],
    topology: Annotated[
        str | None,
        typer.Option(
            help="TPU chips and their number along each side, such as 'v4:2x2x4'; for --strategy best also GPUs: "
            "'H100:8'."
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(callback=within(Count), help="A number of virtual CPU devices, in place of a topology."),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="How the model is split: a name such as heads, 'heads batch@dp', or a layout such as 'kv_heads@tp "
            "hidden@tp'. May be given several times; 'all' takes every legal one, 'best' ranks all by an estimate and "
            "compiles the first three. The first legal one unless given."
        ),
    ] = None,
    mesh: options.Mesh = None,
    objective: Annotated[
        Literal["latency", "throughput"],
        typer.Option(help="With --strategy best: the time of a request, or new tokens per second."),
    ] = "latency",
    batch: Annotated[
        int | None,
        typer.Option(
            callback=within(Count),
            help="Number of rows in a batch; by default 8. With --strategy best: 1 for latency, and for throughput as "
            "many as fit.",
        ),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(callback=within(Count), help="Tokens of each row's prompt; by default 512, or half of the cache."),
    ] = None,
    kv_seq: Annotated[
        int | None,
        typer.Option(
            "--kv-seq",
            callback=within(Count),
            help="Cache slots of each row; by default 4096, or the model's whole context.",
        ),
    ] = None,
    dtype: Annotated[
        options.DType,
        typer.Option(
            help="Precision of weights, activations and cache; in training, whose weights and moments are float32, of "
            "the forward and the backward pass."
        ),
    ] = options.DType.BFLOAT16,
    cache_dtype: options.CacheDType = None,
    quantize: Annotated[
        list[str] | None,
        typer.Option(
            help="Quantize the linear layers of the blocks: nf4, int4, int8 or fp8, as `mistral-eqx quantize` does, or "
            "a type or mixture of GGUF such as Q4_K_M. May be given several times; none is without."
        ),
    ] = None,
    chip: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of a topology: find the smallest number of these chips, such as v5e, that holds weights and "
            "cache, without compiling. May be given several times."
        ),
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Plan a step of training in place of generation.")] = False,
    seq: Annotated[
        int | None, typer.Option(callback=within(Count), help="With --train: tokens of each row; 4096 by default.")
    ] = None,
    zero: Annotated[
        list[int] | None,
        typer.Option(
            callback=within(list[Literal[0, 1, 2, 3]]),
            help="With --train: ZeRO stage, from 0 to 3, that shards the state over the devices of batch; default 0. "
            "May be given several times.",
        ),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(callback=within(Count), help="With --train: number of micro-batches; 1 by default."),
    ] = None,
    remat: Annotated[
        str | None,
        typer.Option(help="With --train: rematerialisation policy: none, dots or block; block by default."),
    ] = None,
    schedule: Annotated[
        Literal["gpipe", "1f1b"] | None,
        typer.Option(
            help="With --train and a strategy that splits layers: the order of micro-batches; gpipe unless given."
        ),
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="With --train: keep the optimizer state in host memory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON in place of tables.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw memory and times into this file, such as plan.png; needs the extra plot.")
    ] = None,
    debug: options.Debug = False,
):
    """Compile a model ahead of time for devices that are not here.

    Shows the memory of each device and whether it suffices, what devices exchange, and the least time for a prompt
    and for each new token. Nothing of the model's size is allocated; a strategy takes some seconds to a minute. A
    strategy that does not fit is named, and the others are planned.
    """
    from rich.console import Console
    from rich.text import Text

    from ..planning import count_devices, holdings_table, plan as compile_plan, rank, ranking_table, smallest, table
    from ..planning.pictures import expect_picture, picture as draw

    schemes = [_scheme(name) for name in quantize or ["none"]]
    if picture is not None:
        expect_picture(picture)
    config = _config(model)
    asked = {"seq": seq, "accumulate": accumulate, "remat": remat, "offload": offload or None, "schedule": schedule}
    trainings = _trainings(train, zero, {name: value for name, value in asked.items() if value is not None})
    if chip is not None:
        unused = {"topology": topology, "devices": devices, "strategy": strategy, "mesh": mesh, "prompt": prompt}
        unused |= {"train": train or None, "picture": picture}
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise InputError(f"--chip finds the number of chips and compiles nothing; leave out --{given[0]}.")
        sizes = {"batch": batch or 8, "kv_seq": kv_seq, "dtype": dtype.value, "cache_dtype": cache_dtype}
        found = [
            dataclasses.replace(smallest(config, one, quantize=scheme, **sizes), model=model)
            for one, scheme in itertools.product(chip, schemes)
        ]
        if as_json:
            typer.echo(json.dumps([one.to_dict() for one in found], indent=2))
        else:
            stdout_console().print(holdings_table(found))
        return
    reports, refused = [], []
    if train and (prompt, kv_seq, cache_dtype) != (None, None, None):
        raise InputError(
            "--prompt, --kv-seq and --cache-dtype are of generation; leave them out beside --train, and give --seq."
        )
    if train and quantize:
        raise InputError("A training step has float weights; leave out --quantize beside --train.")
    rankings: list[Ranking] = []
    if strategy == ["best"]:
        if topology is None or mesh is not None or zero or schedule:
            raise InputError(
                "--strategy best finds the mesh, and in training the ZeRO stage and the schedule, for a chip; give "
                "--topology, and leave out --mesh, --zero and --schedule."
            )
        lengths = {} if train else {"prompt": prompt, "kv_seq": kv_seq, "cache_dtype": cache_dtype}
        goal = "train" if train else objective
        sizes = {"topology": topology, "batch": batch, "dtype": dtype.value, "train": trainings[0] or None, **lengths}
        for scheme in schemes:
            ranking = rank(config, objective=goal, quantize=scheme, **sizes)
            rankings.append(dataclasses.replace(ranking, model=model))
        if not as_json:
            stdout_console().print(*(ranking_table(ranking) for ranking in rankings), sep="\n\n")
        reason = _not_compiled(topology)
        if reason is not None:
            if as_json:
                estimates = [ranking.to_dict() for ranking in rankings]
                typer.echo(json.dumps({"rankings": estimates, "reports": []}, indent=2))
            else:
                typer.echo(reason, err=True)
            return
        plans = []
        for ranking, scheme in zip(rankings, schemes, strict=True):
            for one in ranking.best[:_COMPILED]:
                plans.append((one.choice, one.training or False, scheme, one.batch))
    else:
        lengths = {"seq": seq, "micro_batches": accumulate}
        strategies = _wanted(config, strategy or [], mesh, count_devices(topology, devices), lengths)
        plans = [(*one, batch) for one in itertools.product(strategies, trainings, schemes)]
    for wanted, training, scheme, rows in plans:
        name = wanted if isinstance(wanted, str) else wanted.name
        try:
            with Console(stderr=True).status(Text(f"Compiling {name} for {topology or 'virtual devices'}")):
                report = compile_plan(
                    config,
                    topology=topology,
                    devices=devices,
                    strategy=wanted,
                    mesh=mesh,
                    batch=rows,
                    prompt=prompt,
                    kv_seq=kv_seq,
                    dtype=dtype.value,
                    cache_dtype=cache_dtype,
                    quantize=scheme,
                    train=training,
                )
        except InputError as error:
            refused.append((name, error))
        else:
            reports.append(dataclasses.replace(report, model=model))
    if not reports:
        raise refused[0][1]
    if picture is not None:
        with interrupts.held():
            draw(reports, picture)
    if as_json:
        found = [report.to_dict() for report in reports]
        estimates = [ranking.to_dict() for ranking in rankings]
        typer.echo(json.dumps({"rankings": estimates, "reports": found} if rankings else found, indent=2))
    else:
        stdout_console().print(table(reports))
    for name, error in refused:
        typer.echo(f"{name} is not planned: {error}", err=True)


def _not_compiled(topology: str) -> str | None:
    """Why the best layouts are not compiled, if they are not."""
    import importlib.util

    from ..planning.arguments import chip_of

    if chip_of(topology).switched is not None:
        return "Estimated only: programs are compiled for TPUs."
    if importlib.util.find_spec("libtpu") is None:
        return "Estimated only: compiling the best needs libtpu; run pip install 'mistral-eqx[tpu]'."
    return None


def _scheme(name: str) -> AbstractScheme | None:
    """The scheme of a name, with the block size that `mistral-eqx quantize` has by default."""
    from ..quant import GGUF, AbstractCalibratedScheme
    from .quantize import Scheme, scheme_of

    if name == "none":
        return None
    if name in [*Scheme]:
        found = scheme_of(Scheme(name))
        if isinstance(found, AbstractCalibratedScheme):
            raise InputError(f"--quantize is {name!r}, whose weights are as large as those of int4; give this one.")
        return found
    try:
        return GGUF(name)
    except InputError as error:
        raise InputError(
            f"--quantize is {name!r}; it must be none, nf4, int4, int8, fp8, or a type of GGUF such as Q4_K or Q4_K_M."
        ) from error


def _config(model: str) -> MistralConfig:
    from ..checkpoint import open_checkpoint
    from ..presets import PRESETS
    from .loading import locate

    return PRESETS[model] if model in PRESETS else open_checkpoint(locate(model)).config


def _trainings(train: bool, zero: list[int] | None, asked: dict[str, Any]) -> list[Training | bool]:
    """The steps of training that were asked for; one that is none where it is generation that is planned."""
    from ..planning import Training

    if train:
        return [*(Training(zero=stage, **asked) for stage in zero or [0])]
    names = [*(["zero"] if zero else []), *asked]
    if names:
        raise InputError(f"--{names[0]} is of training; add --train, or leave it out.")
    return [False]


def _wanted(
    config: MistralConfig, asked: list[str], mesh: str | None, count: int, lengths: dict[str, int | None]
) -> list[Choice | str]:
    """The strategies that were asked for, those that will be refused too."""
    from ..parallel import NAMED, strategies
    from ..parallel.mesh import parse_axes

    if asked and asked != ["all"]:
        return [*asked]
    if count == 1:
        return ["single"]
    axes = None if mesh is None else parse_axes(mesh)
    legal = [choice for choice in strategies(config, count, **lengths) if axes is None or choice.axes == axes]
    if not asked:
        return [*legal[:1]] or ["heads"]
    return [*legal, *(name for name in NAMED if all(choice.strategy != NAMED[name] for choice in legal))]
