"""What a user sees when something is wrong: one sentence. Exit code 2 for an input, 70 for a fault of this program."""

import contextlib
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from .. import interrupts
from . import processes
from .options import DEBUG


# typer gives out this child of the class of all wrong usage, but not the class.
_UsageError: Any = typer.BadParameter.__base__

# A message of the library names its argument; here that is an option. A path that has such a word stays as it is.
_ARGUMENT = re.compile(
    r"(?<![^\s(])(max_new_tokens|num_processes|process_id|top_k|top_p|min_p|typical_p|length_penalty|max_shard_size"
    r"|^(?:temperature|context|stride)|(?<=\()(?:overwrite|tokenizer=False|allow_nonfinite=True))"
    r"(?![^\s,;.)])"
)
_OPTIONS = {"tokenizer=False": "--no-tokenizer", "allow_nonfinite=True": "--allow-nonfinite"}


class OneSentence(TyperGroup):
    """A group of commands in which a user's mistake ends with exit code 2 and one sentence on stderr.

    `--debug` shows the traceback instead. Ctrl-C ends with 130, and a closed pipe with 141, without a word, as for
    other programs that a signal ends.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # which shows the help
        with _one_sentence(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _one_sentence(ctx):
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_sentence(ctx: Any) -> Iterator[None]:
    try:
        with interrupts.unless_leaving():
            yield
    except KeyboardInterrupt:
        if interrupts.came() is not None:
            interrupts.leave()
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # Else Python would try to write the rest at exit, and complain.
        processes.drop(sys.stdout)
        raise typer.Exit(141) from None
    except _UsageError as error:
        _end(error.format_message())
    except OSError as error:
        if ctx.meta.get(DEBUG):
            raise
        _end(f"{error.filename or 'A file'} cannot be used: {error.strerror or error}.")
    except ValueError as error:
        if ctx.meta.get(DEBUG):
            raise
        _end(_ARGUMENT.sub(lambda name: _option(name[0]), str(error)))


def _option(argument: str) -> str:
    return _OPTIONS.get(argument, "--" + argument.replace("_", "-"))


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:200]


def _briefly(error: Exception) -> str:
    """The kind of an error, what it says, and the last line of this package that it passed."""
    package = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)]
    where = f" at {Path(frames[-1].filename).relative_to(package)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())[:200]}"


def _end(sentence: str, code: int = 2) -> NoReturn:
    where = f" in process {processes.number()}" if processes.number() else ""
    typer.echo(f"Error{where}: {' '.join(sentence.split())}", err=True)
    raise typer.Exit(code)
