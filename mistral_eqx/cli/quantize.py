"""`mistral-eqx quantize`: a checkpoint with weights of fewer bits."""

import enum
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..documents import to_path
from ..errors import InputError
from . import options
from .convert import say_written
from .evaluate import open_text


if TYPE_CHECKING:
    from ..quant import AnyScheme


class Scheme(enum.StrEnum):
    """Schemes that a folder can hold."""

    NF4 = "nf4"
    INT4 = "int4"
    INT8 = "int8"
    FP8 = "fp8"
    GPTQ = "gptq"
    AWQ = "awq"


# As in GPTQ's own code: at most 128 rows of 2048 tokens.
_ROWS, _SEQ = 128, 2048


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
            "--scheme",
            help="nf4 for 4 bits; int4 and int8 for whole numbers; fp8 for floats of 8 bits, e4m3; gptq and awq for "
            "whole numbers of 4 bits by what layers see on a text.",
        ),
    ] = Scheme.NF4,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            min=1,
            help="How many inputs share a scale: by default 64 for nf4 and int4, 128 for gptq and awq, and a whole row "
            "for int8 and fp8.",
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Try smaller ranges for the least squared error; int4, int8 and fp8.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="The text that gptq and awq need, UTF-8, such as texts of the kind that the model is for; of its "
            f"tokens the first {_ROWS * _SEQ:,} are used.",
        ),
    ] = None,
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

    transformers reads nf4 with bitsandbytes, int8 and fp8 with compressed-tensors, and the others with it too if it
    dequantizes them. Norms, embeddings and head stay as they are, but for the norms with awq. Only one weight at a time
    is in memory as floats; with gptq and awq, which need --calibration, the model is.
    """
    import mistral_eqx as mx

    from ..checkpoint import open_checkpoint
    from ..checkpoint.staging import expect_free
    from ..conversion import tokenizer_writer
    from ..quant import AbstractCalibratedScheme, checked_calibration
    from .loading import locate
    from .progress import progress_bar

    to_path(target, "The target", "give the folder to write")
    recipe = scheme_of(scheme, block_size, search)
    calibrated = isinstance(recipe, AbstractCalibratedScheme)
    if calibrated != (calibration is not None):
        raise InputError(
            f"--scheme {scheme} needs a text; add --calibration FILE."
            if calibrated
            else f"--calibration is not for {scheme}, which sees no text; leave it out.",
            key="calibration",
        )
    path = locate(source)
    expect_free(target, overwrite)
    finish = None if no_tokenizer else tokenizer_writer(path)
    checkpoint = open_checkpoint(path)
    # A folder cannot hold the blocks of a GGUF file beside its own.
    dtype = dtype or options.DType(checkpoint.dtype.name)
    if calibration is None:
        with progress_bar("Quantizing") as bar:
            model = mx.load(path, dtype=dtype, quantize=recipe, progress=bar)
    else:
        config = checkpoint.config
        ids = checked_calibration(_tokens(calibration, path, config.max_positions), config)
        with progress_bar("Loading") as bar:
            model = mx.load(path, dtype=dtype, progress=bar)
        with progress_bar("Quantizing", counts=True) as bar:
            model = mx.quantize(model, recipe, calibration=ids, progress=bar)
    mx.save(model, target, max_shard_size=max_shard_size, overwrite=overwrite, finish=finish)
    say_written(target)


def _tokens(file: Path, model: Path, context: int) -> list[list[int]]:
    """The tokens of a text in rows of one length; those that fill no row are left out."""
    import mistral_eqx as mx

    from ..evaluate.windows import encode_parts

    with open_text(file) as text:
        parts = encode_parts(mx.load_tokenizer(model), text)
        ids = list(itertools.islice((token.id for part in parts for token in part), _ROWS * _SEQ))
    seq = min(_SEQ, context, len(ids))
    return [ids[start : start + seq] for start in range(0, len(ids) - seq + 1, seq)]


def scheme_of(scheme: Scheme, size: int | None = None, search: bool = False) -> "AnyScheme":
    """The scheme of the options: its name, `--block-size` and `--search`."""
    from ..quant import AWQ, FP8, GPTQ, NF4, RTN, Int8

    if search and scheme not in (Scheme.INT4, Scheme.INT8, Scheme.FP8):
        raise InputError(f"--search is for int4, int8 and fp8, not for {scheme}; leave it out.")
    match scheme:
        case Scheme.NF4:
            return NF4(size or 64)
        case Scheme.INT4:
            return RTN(group_size=size or 64, search=search)
        case Scheme.INT8:
            return Int8(by=size or "row", search=search)
        case Scheme.GPTQ:
            return GPTQ(group_size=size or 128)
        case Scheme.AWQ:
            return AWQ(group_size=size or 128)
        case Scheme.FP8 if size is None:
            return FP8(search=search)
    raise InputError("--block-size is not for fp8, of which a folder holds one scale a row; leave it out.")
