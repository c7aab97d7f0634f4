"""Options that several commands take, as dataclasses, so that they read the same everywhere."""

import dataclasses
import enum
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from annotated_types import Ge, Le

from .. import checks
from ..checks import checked
from ..errors import InputError


if TYPE_CHECKING:
    from ..generation import Sampler
    from ..text import Grammar


DEFAULT_MODEL = "smollm2-135m"
DEBUG = "mistral_eqx.debug"


class DType(enum.StrEnum):
    """Precisions a model can be loaded or written in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def _remember(context: Any, wanted: bool) -> bool:
    # typer finds out by its place that the first argument is the context, which is no `typer.Context` by its class.
    if wanted:
        context.meta[DEBUG] = True
    return wanted


def within(kind: Any) -> Callable[[Any, Any, Any], Any]:
    """The callback of an option that must be of a type and range, as `mistral_eqx.checks` declares them.

    A message has the option as the user types it.
    """

    def check(context: Any, option: Any, value: Any) -> Any:
        return value if value is None else checked(value, kind, max(option.opts, key=len), key=option.name)

    return check


def flat(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command for typer, which knows no dataclasses: each parameter that is one of options becomes its fields."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        parameter.name: parameter.annotation
        for parameter in signature.parameters.values()
        if dataclasses.is_dataclass(parameter.annotation)
    }

    def parameters() -> Iterator[inspect.Parameter]:
        for parameter in signature.parameters.values():
            if (group := groups.get(parameter.name)) is None:
                yield parameter
                continue
            kinds = typing.get_type_hints(group, include_extras=True)
            for field in dataclasses.fields(group):
                yield parameter.replace(name=field.name, annotation=kinds[field.name], default=field.default)

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        return command(**given)

    flattened = signature.replace(parameters=list(parameters()))
    run.__signature__ = flattened  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flattened.parameters.values()}
    return run


Penalty = Annotated[float, Ge(-2), Le(2)]
# Under which heading the help of a command has an option.
MODEL, PROMPTS, SAMPLING, BEAMS, DEVICES = "Model", "Prompts and output", "Sampling", "Beam search", "Devices"
GRAMMAR = "Structured output"

MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", callback=within(checks.Count), help="How many tokens to add at most.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End a text before this string; may be given several times."),
]
CacheDType = Annotated[
    checks.CacheDType | None,
    typer.Option(
        help="Round keys and values to 8 bits: a KV cache of about a quarter of float32's size. By default it has the "
        "model's precision."
    ),
]
Seed = Annotated[
    int, typer.Option(callback=within(checks.Seed), help="Seed of the random numbers.", rich_help_panel=SAMPLING)
]
Mesh = Annotated[
    str | None,
    typer.Option(help="Axes of the devices and their sizes, such as 'tp=8' or 'kv=8,rep=2'.", rich_help_panel=DEVICES),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no metrics.")]
# Nothing in a command reads it: `errors.OneSentence` finds it in the context.
Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember, is_eager=True, help="Show the traceback of an error.")
]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A checkpoint's folder, a .gguf file, a preset or a hub id such as 'owner/name'.",
            rich_help_panel=MODEL,
        ),
    ] = DEFAULT_MODEL
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            metavar="FOLDER",
            help="Put the adapters of this folder beside the weights; PEFT and training write such folders.",
            rich_help_panel=MODEL,
        ),
    ] = None
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Precision of the weights, to which quantized ones are expanded; by default all keep the "
            "checkpoint's own.",
            rich_help_panel=MODEL,
        ),
    ] = None
    check: Annotated[
        bool, typer.Option("--check", help="Refuse weights that are not finite numbers.", rich_help_panel=MODEL)
    ] = False

    @property
    def agreed(self) -> tuple[DType | None, bool]:
        """What all processes must have alike; the paths of the same files may differ."""
        return self.dtype, self.adapter is not None

    def check_adapter(self):
        """Refuses a folder without adapters before the weights are read.

        **Raises:** `ValueError` that names the folder.
        """
        from ..checkpoint.peft import adapter_folder

        if self.adapter is not None:
            adapter_folder(self.adapter)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; `None` for what was not given."""

    temperature: Annotated[
        float | None,
        typer.Option(
            callback=within(checks.NotNegative),
            help="Divides the logits: below 1 is more cautious, 0 always takes the likeliest token.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            callback=within(checks.Count),
            help="Draw among this many of the likeliest tokens.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            callback=within(checks.PositiveShare),
            help="Draw among the fewest tokens whose probabilities sum to this much.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            callback=within(checks.Share),
            help="Draw among tokens at least this many times as likely as the likeliest.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    typical_p: Annotated[
        float | None,
        typer.Option(
            callback=within(checks.PositiveShare),
            help="Draw among the tokens of the most usual surprise whose probabilities sum to this much.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            callback=within(checks.Positive),
            help="Above 1 makes tokens of the prompt and of the new text less likely.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        typer.Option(
            callback=within(Penalty),
            help="Taken off the logit of each token of the new text, from -2 to 2.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option(
            callback=within(Penalty),
            help="Taken off the logit of a token for each time that the new text has it, from -2 to 2.",
            rich_help_panel=SAMPLING,
        ),
    ] = None

    def sampler(self, min_new_tokens: int = 0, grammar: "Grammar | None" = None) -> "Sampler":
        """A sampler with a processor for each penalty that was given, and one that follows a grammar.

        **Raises:** `ValueError` if a value is outside its range.
        """
        import mistral_eqx as mx

        processors: list[mx.AbstractProcessor] = []
        if self.repetition_penalty is not None:
            processors.append(mx.RepetitionPenalty(self.repetition_penalty))
        if self.presence_penalty is not None:
            processors.append(mx.PresencePenalty(self.presence_penalty))
        if self.frequency_penalty is not None:
            processors.append(mx.FrequencyPenalty(self.frequency_penalty))
        if min_new_tokens:
            processors.append(mx.MinNewTokens(min_new_tokens))
        if grammar is not None:
            processors.append(mx.Guided(grammar))
        return mx.Sampler(self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p, processors)


@dataclasses.dataclass(frozen=True)
class SpeculationOptions:
    """Where tokens are proposed that the model checks several at a time."""

    prompt_lookup: Annotated[
        bool,
        typer.Option(
            "--prompt-lookup",
            help="Decode faster where the text repeats itself or its prompt: check several tokens of it at a time.",
            rich_help_panel=MODEL,
        ),
    ] = False
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Decode faster with a smaller model of the same tokenizer: check several of its tokens at a time.",
            rich_help_panel=MODEL,
        ),
    ] = None

    def check(self):
        """Refuses both at once.

        **Raises:** `ValueError` that names the options.
        """
        if self.prompt_lookup and self.draft is not None:
            raise InputError("--prompt-lookup and --draft both propose tokens; leave one of the two out.")

    @property
    def agreed(self) -> tuple[bool, bool]:
        """What all processes must have alike; the paths of the same files may differ."""
        return self.prompt_lookup, self.draft is not None


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Over which devices a model is split, and how."""

    mesh: Mesh = None
    strategy: Annotated[
        str | None,
        typer.Option(
            help="How the model is split over the mesh: heads, sequence_parallel, head_dim, kv_replicated, "
            "heads_x_head_dim, heads_x_kv_seq, or a layout such as 'kv_heads@tp hidden@tp'. By default the first of "
            "these that fits.",
            rich_help_panel=DEVICES,
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class ProcessOptions(DeviceOptions):
    """The same, and the processes that have these devices."""

    coordinator: Annotated[
        str | None,
        typer.Option(
            help="Where process 0 of several runs, HOST:PORT; 'auto' under SLURM, Open MPI and on Cloud TPU.",
            metavar="HOST:PORT",
            rich_help_panel=DEVICES,
        ),
    ] = None
    num_processes: Annotated[
        int | None,
        typer.Option(callback=within(checks.Count), help="How many processes there are.", rich_help_panel=DEVICES),
    ] = None
    process_id: Annotated[
        int | None,
        typer.Option(
            callback=within(checks.CountOrZero),
            help="Index of this process, from 0; only process 0 prints.",
            rich_help_panel=DEVICES,
        ),
    ] = None

    @property
    def alone(self) -> bool:
        """Whether this process is the only one."""
        return (self.coordinator, self.num_processes, self.process_id) == (None, None, None)
