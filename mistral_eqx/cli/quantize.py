"""`mistral-eqx quantize`: a checkpoint with weights of fewer bits."""

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from ..documents import to_path
from ..errors import InputError
from . import options
from .convert import say_written


if TYPE_CHECKING:
    from ..quant import AbstractScheme


class Scheme(enum.StrEnum):
    """Schemes that a folder can hold."""

    NF4 = "nf4"
    INT4 = "int4"
    INT8 = "int8"
    FP8 = "fp8"


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A checkpoint's folder, a .gguf file, a preset or a hub id such as 'owner/name'."
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write.")],
    scheme: Annotated[
        Scheme,
        typer.Option(
            "--scheme", help="nf4 for 4 bits; int4 and int8 for whole numbers; fp8 for floats of 8 bits, e4m3."
        ),
    ] = Scheme.NF4,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            min=1,
            help="How many inputs share a scale: by default 64 for nf4 and int4, and a whole row for int8 and fp8.",
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Try smaller ranges for the least squared error; int4 and int8.")
    ] = False,
    dtype: Annotated[
        options.DType | None,
        typer.Option("--dtype", help="Precision of all that is not quantized; the source's own unless given."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest size of a weight file, such as 5GB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Write config and weights alone.")] = False,
    debug: options.Debug = False,
):
    """Quantize the linear layers of a model and write it as a folder.

    transformers reads the folder too: nf4 with bitsandbytes, the others with compressed-tensors. Norms, embeddings and
    head stay as they are. Only one weight at a time is in memory as floats.
    """
    import mistral_eqx as mx

    from ..checkpoint.staging import expect_free
    from ..conversion import tokenizer_writer
    from .loading import locate
    from .progress import progress_bar

    to_path(target, "The target", "give the folder to write")
    wanted = scheme_of(scheme, block_size, search)
    path = locate(source)
    expect_free(target, overwrite)
    finish = None if no_tokenizer else tokenizer_writer(path)
    with progress_bar("Quantizing") as bar:
        model = mx.load(path, dtype=dtype, quantize=wanted, progress=bar)
    mx.save(model, target, max_shard_size=max_shard_size, overwrite=overwrite, finish=finish)
    say_written(target)


def scheme_of(scheme: Scheme, size: int | None = None, search: bool = False) -> "AbstractScheme":
    """The scheme of the options: its name, `--block-size` and `--search`."""
    from ..quant import FP8, NF4, RTN, Int8

    if search and scheme not in (Scheme.INT4, Scheme.INT8):
        raise InputError(f"--search tries ranges of whole numbers, which {scheme} has none of; leave it out.")
    match scheme:
        case Scheme.NF4:
            return NF4(size or 64)
        case Scheme.INT4:
            return RTN(group_size=size or 64, search=search)
        case Scheme.INT8:
            return Int8(by=size or "row", search=search)
        case Scheme.FP8 if size is None:
            return FP8()
    raise InputError("--block-size is not for fp8, of which a folder holds one scale a row; leave it out.")
