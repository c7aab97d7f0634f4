"""What a user sees when something is wrong: one sentence. Exit code 2 for an input, 70 for a fault of this program."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from .. import interrupts
from ..documents import shown
from ..errors import InputError
from . import processes
from .options import DEBUG


# typer gives out this child of the class of all wrong usage, but not the class.
_UsageError: Any = typer.BadParameter.__base__
# These end a command, and nothing is wrong.
_ENDS = (typer.Exit, typer.Abort, SystemExit, GeneratorExit)
_LONGEST = 2000
# A word that is no part of a path, with a value as Python writes arguments.
_WORD = re.compile(r"(?<![\w./-])(?P<name>[a-z]\w*)(?P<value>=True|=False)?(?![\w/=-]|\.\w)")


class OneSentence(TyperGroup):
    """A group of commands in which a user's mistake ends with exit code 2 and one sentence on stderr.

    What is no mistake of the user ends with 70 and a line that can be reported. `--debug` shows the traceback instead.
    Ctrl-C ends with 130, and a closed pipe with 141, without a word, as for other programs that a signal ends.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # which shows the help
        with _one_sentence(self, ctx):
            _expect_text(args)
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _one_sentence(self, ctx):
            return super().invoke(ctx)


class Command(TyperCommand):
    """A command with headings in its help, which imports JAX only after its options are parsed."""

    def format_options(self, ctx: Any, formatter: Any):
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (line := parameter.get_help_record(ctx)) is not None:
                other = "Arguments" if parameter.param_type_name == "argument" else "Options"
                heading = getattr(parameter, "rich_help_panel", None) or other
                sections.setdefault(heading, []).append(line)
        for heading, lines in sorted(sections.items(), key=lambda section: section[0] == "Options"):
            with formatter.section(heading):
                formatter.write_dl(lines)

    def invoke(self, ctx: Any) -> Any:
        from .. import environment  # noqa: F401

        return super().invoke(ctx)


def _expect_text(arguments: list[str]):
    """Refuses what no name of a file and no text can have, wherever it stands."""
    for argument in arguments:
        wrong = "a null byte" if "\0" in argument else None if argument.isascii() else _not_utf8(argument)
        if wrong is not None:
            raise InputError(
                f"The argument {shown(argument)} has {wrong}, which neither the name of a model or file nor a text "
                "can have here; give another one."
            )


def _not_utf8(argument: str) -> str | None:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return "bytes that are not UTF-8"
    return None


@contextlib.contextmanager
def _one_sentence(group: Any, ctx: Any) -> Iterator[None]:
    try:
        with interrupts.unless_leaving():
            yield
    except _ENDS:
        raise
    except KeyboardInterrupt:
        if interrupts.came() is not None:
            interrupts.leave()
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # Else Python would try to write the rest at exit, and complain.
        processes.drop(sys.stdout)
        raise typer.Exit(141) from None
    except _UsageError as error:
        _end(error.format_message().replace(": Value error, ", ": "))  # which typer has from pydantic
    except BaseException as error:  # a panic of Rust is no `Exception`
        if ctx.meta.get(DEBUG):
            raise
        if isinstance(error, InputError):
            _end(_with_options(error, _options(group, ctx.invoked_subcommand)))
        if isinstance(error, OSError):
            _end(f"{_file(error)} cannot be used: {error.strerror or error}.")
        if _is_out_of_memory(error):
            _end(f"There is not enough memory for this ({_briefly(error)}); take a smaller model, batch or context.")
        _end(
            f"This is a fault of mistral-eqx, not of your input: {_briefly(error)}; please report it, with the command "
            "and what it prints with --debug.",
            70,
        )


def _options(group: Any, command: str | None) -> dict[str, str]:
    """The options of a command, and of those in it, by the names of their arguments."""
    found = group.commands.get(command)
    commands = [] if found is None else [found, *getattr(found, "commands", {}).values()]
    return {
        option.name: max(option.opts, key=len)
        for command in commands
        for option in command.params
        if option.param_type_name == "option"
    }


def _with_options(error: InputError, options: dict[str, str]) -> str:
    """A message of the library, in which arguments that are options of the running command have the options' names.

    A word is an argument if the error says so, has an underscore or a value, or stands in parentheses. What is between
    quotation marks is the user's, and a word that is no option of this command stays as it is.
    """

    def option(word: re.Match[str]) -> str:
        name, value, text = word["name"], word["value"], word.string
        if value == "=False" and f"no_{name}" in options:
            return options[f"no_{name}"]
        alone = text[word.start() - 1 : word.end() + 1] == f"({name})"
        spoken = value or alone or "_" in name or (name == error.key and error.file is None)
        return options[name] if spoken and name in options else word[0]

    quoted = re.split(r"('[^']*'|\"[^\"]*\")", str(error))
    return "".join(part if at % 2 else _WORD.sub(option, part) for at, part in enumerate(quoted))


def _file(error: OSError) -> str:
    """The file of an error of the system, as the user gave it."""
    if error.filename is None:
        return "stdout, or a file that was being written,"  # files that this program writes are named by whoever writes
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return name if name and name.isprintable() and len(name) <= 300 else shown(name)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:200]


def _briefly(error: BaseException) -> str:
    """The kind of an error, what it says, and the last line of this package that it passed."""
    package = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)]
    where = f" at {Path(frames[-1].filename).relative_to(package)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())[:200]}"


def _end(sentence: str, code: int = 2) -> NoReturn:
    where = f" in process {processes.number()}" if processes.number() else ""
    line = " ".join(sentence.split())
    # A file's name may have what would move the cursor, or half of a character.
    line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
    typer.echo(f"Error{where}: {line if len(line) <= _LONGEST else line[:_LONGEST] + '...'}", err=True)
    raise typer.Exit(code)
