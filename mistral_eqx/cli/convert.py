"""`mistral-eqx convert`: a checkpoint of any format, written as one of two."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from ..documents import to_path
from . import options, processes


class Format(enum.StrEnum):
    """Formats that can be written."""

    HF = "hf"
    MISTRAL = "mistral"
    GGUF = "gguf"


FormatOption = Annotated[
    Format, typer.Option("--format", help="Hugging Face's layout, Mistral's, or one file for llama.cpp.")
]
TypeOption = Annotated[
    str | None,
    typer.Option("--type", help="For gguf: the type of the weights, such as Q8_0 or Q4_K_M; by default as they are."),
]


def say_written(target: str):
    """Says where a checkpoint was written, and how large it is."""
    path = Path(target).expanduser()
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    processes.say(f"Wrote {target} ({size / 1e6:,.0f} MB).")


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A checkpoint's folder, a .gguf file, a preset or a hub id such as 'owner/name'."
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write, or the .gguf file.")],
    format: FormatOption = Format.HF,
    dtype: Annotated[
        options.DType | None, typer.Option("--dtype", help="Precision to write; the source's own unless given.")
    ] = None,
    type: TypeOption = None,
    max_shard_size: Annotated[str, typer.Option(help="The most a file of weights may have, such as 5GB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Write config and weights alone.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Write weights that are NaN or infinite too.")
    ] = False,
    debug: options.Debug = False,
):
    """Write a checkpoint in another format.

    The model is never in memory as a whole. Its tokenizer goes along, also one that is in a .gguf file. The target
    appears under its name only when it is complete.
    """
    import mistral_eqx as mx

    from .loading import locate
    from .progress import progress_bar

    to_path(target, "The target", "give the folder to write")
    path = locate(source)
    with progress_bar("Converting") as bar:
        mx.convert(
            path,
            target,
            format=format.value,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            tokenizer=not no_tokenizer,
            allow_nonfinite=allow_nonfinite,
            progress=bar,
            type=type,
        )
    say_written(target)
