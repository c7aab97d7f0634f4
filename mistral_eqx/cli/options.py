"""Options that several commands take, so that they read the same everywhere."""

import enum
from collections.abc import Callable
from typing import Annotated, Any

import typer
from annotated_types import Ge, Le

from .. import checks
from ..checks import checked


DEFAULT_MODEL = "smollm2-135m"
DEBUG = "mistral_eqx.debug"


class DType(enum.StrEnum):
    """Precisions a model can be loaded in or written in."""

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


Penalty = Annotated[float, Ge(-2), Le(2)]

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A checkpoint's folder, a .gguf file, a preset or a hub id such as 'owner/name'."
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", callback=within(checks.Count), help="How many tokens to add at most.")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        callback=within(checks.NotNegative),
        help="Divides the logits: below 1 is more cautious, 0 always takes the likeliest token.",
    ),
]
TopK = Annotated[
    int | None, typer.Option(callback=within(checks.Count), help="Draw among this many of the likeliest tokens.")
]
TopP = Annotated[
    float | None,
    typer.Option(
        callback=within(checks.PositiveShare), help="Draw among the fewest tokens whose probabilities sum to this much."
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        callback=within(checks.Share), help="Draw among tokens at least this many times as likely as the likeliest."
    ),
]
TypicalP = Annotated[
    float | None,
    typer.Option(
        callback=within(checks.PositiveShare),
        help="Draw among the tokens of the most usual surprise whose probabilities sum to this much.",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        callback=within(checks.Positive), help="Above 1 makes tokens of the prompt and of the new text less likely."
    ),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(callback=within(Penalty), help="Taken off the logit of each token of the new text, from -2 to 2."),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(
        callback=within(Penalty),
        help="Taken off the logit of a token for each time that the new text has it, from -2 to 2.",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Where the new text has this, it ends, before it; may be given several times."),
]
Seed = Annotated[int, typer.Option(callback=within(checks.Seed), help="Where the random numbers start.")]
LoadDType = Annotated[
    DType | None, typer.Option("--dtype", help="Precision to load in; the checkpoint's own unless given.")
]
Mesh = Annotated[str | None, typer.Option(help="Axes of the devices and their sizes, such as 'tp=8' or 'kv=8,rep=2'.")]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="How the model is split over the mesh: heads, sequence_parallel, head_dim, kv_replicated, "
        "heads_x_head_dim, heads_x_kv_seq, or a layout such as 'kv_heads@tp hidden@tp'; the first of these that fits "
        "unless given."
    ),
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        help="Where process 0 of several runs, HOST:PORT; 'auto' under SLURM, Open MPI and on Cloud TPU.",
        metavar="HOST:PORT",
    ),
]
NumProcesses = Annotated[int | None, typer.Option(callback=within(checks.Count), help="How many processes there are.")]
ProcessId = Annotated[
    int | None,
    typer.Option(callback=within(checks.CountOrZero), help="The number of this one, from 0; only process 0 prints."),
]
Check = Annotated[bool, typer.Option("--check", help="Refuse weights that are not finite numbers.")]
# Nothing in a command reads it: `errors.OneSentence` finds it in the context.
Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember, is_eager=True, help="Show the traceback of an error.")
]
