"""What a user sees when something is wrong: one sentence, and exit code 2."""

import os
import re
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from .options import DEBUG


# typer gives out this child of the class of all wrong usage, but not the class.
_UsageError: Any = typer.BadParameter.__base__

# A message of the library names its argument; here that is an option. A path that has such a word stays as it is.
_ARGUMENT = re.compile(
    r"(?<![^\s(])(max_new_tokens|top_k|top_p|max_shard_size|^temperature|(?<=\()overwrite)(?![^\s,;.)])"
)


class OneSentence(TyperGroup):
    """A group of commands in which a user's mistake ends with exit code 2 and one sentence on stderr.

    `--debug` shows the traceback instead. Ctrl-C ends with 130 and a closed pipe with 141, as for other programs that
    a signal ends, both without a word.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Else Python would try to write the rest at exit, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
            _end(_ARGUMENT.sub(lambda name: "--" + name[0].replace("_", "-"), str(error)))


def _end(sentence: str):
    typer.echo(f"Error: {' '.join(sentence.split())}", err=True)
    raise typer.Exit(2)
