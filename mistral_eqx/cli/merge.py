"""`mistral-eqx merge`: adapters, added to the weights of their model."""

from pathlib import Path
from typing import Annotated

import typer

from ..documents import to_path
from ..errors import InputError
from . import options
from .convert import Format, FormatOption, TypeOption, say_written


def merge(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="The model: a checkpoint's folder, a .gguf file, a preset or a hub id."),
    ],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of adapters, as PEFT writes it.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write, or the .gguf file.")],
    format: FormatOption = Format.HF,
    dtype: Annotated[
        options.DType | None, typer.Option("--dtype", help="Precision to write; by default the model's own.")
    ] = None,
    type: TypeOption = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest size of a weight file, such as 5GB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Write config and weights alone.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Write weights that are NaN or infinite too.")
    ] = False,
    debug: options.Debug = False,
):
    """Write a model with its adapters added.

    The sum of weights and adapters is written as a checkpoint, with the model's tokenizer. It runs as fast as the model
    without adapters, and every program that reads checkpoints can load it. The target appears only when it is complete.
    """
    import mistral_eqx as mx

    from ..checkpoint.staging import expect_free
    from ..conversion import tokenizer_writer
    from .loading import load, locate

    to_path(target, "The target", "give the folder to write")
    wanted = options.ModelOptions(source, adapter, dtype)
    wanted.check_adapter()
    path = locate(source)
    to_gguf = format is Format.GGUF
    if to_gguf and no_tokenizer:
        raise InputError("A GGUF file holds its tokenizer; leave --no-tokenizer out.")
    if to_gguf:
        from ..checkpoint.gguf_writing import expect_free_file

        expect_free_file(Path(target).expanduser(), overwrite)
    else:
        expect_free(target, overwrite)
    finish = None if no_tokenizer or to_gguf else tokenizer_writer(path)
    mx.save(
        mx.merge_lora(mx.dequantize(load(path, wanted, None, mx.SINGLE))),
        target,
        format=format.value,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        finish=finish,
        type=type,
        tokenizer=mx.load_tokenizer(path) if to_gguf else None,
    )
    say_written(target)
