"""Renders chat templates in a process of its own, whose time and memory are limited: a template is anyone's program.

It runs as a script, knows nothing of the package, and answers requests on stdin until there are no more. A message is
its length in 8 bytes, and an object of JSON.
"""

import contextlib
import functools
import json
import signal
import struct
import sys
import traceback
from collections.abc import Iterator
from datetime import datetime
from typing import Any, BinaryIO

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Refusal(TemplateError):
    """A template's own objection."""


class _Spent(BaseException):
    """A limit is reached. It is no `Exception`, so that no filter takes it for a wrong value."""


class _Namespace(Namespace):
    """A namespace without hidden names, which the sandbox would not watch."""

    def __init__(*args: Any, **kwargs: Any):  # `self` may be one of the names
        self, *rest = args
        Namespace.__init__(self, *rest, **kwargs)
        for name in dict(*rest, **kwargs):
            _check_visible(name)

    def __setitem__(self, name: str, value: Any):
        _check_visible(name)
        Namespace.__setitem__(self, name, value)


def _check_visible(name: Any):
    if str(name).startswith("_"):
        raise SecurityError(f"it sets {name!r} on a namespace.")


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox that refuses a forbidden name where it is used, not only what is done with it."""

    # What is put around the assistant's words.
    marks: tuple[str, str] = "", ""

    def unsafe_undefined(self, obj: Any, attribute: str):
        raise SecurityError(f"it uses {attribute!r} of a {type(obj).__name__}.")


class _Generation(Extension):
    """Marks what a template says that the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, as in transformers: what is set in it is not known behind it.
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        start, stop = self.environment.marks
        return f"{start}{caller()}{stop}"


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _refuse(message: str):
    raise Refusal(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as such; jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """The text, or what is wrong and where."""
    template = None
    try:
        with _limited(request["seconds"]):
            template = _compiled(request["template"])
            template.environment.marks = request["marks"]
            return {"text": _render(template, request["variables"], request["characters"])}
    except MemoryError as error:
        return {"error": "spent", "reason": "memory", "line": _line(error)}
    except _Spent as error:
        # jinja2 puts its own lines only into what is an `Exception`.
        line = _line(error)
        line = None if line is None or template is None else template.get_corresponding_lineno(line)
        return {"error": "spent", "reason": str(error), "line": line}
    except TemplateSyntaxError as error:
        return {"error": "syntax", "reason": str(error.message), "line": error.lineno}
    except Refusal as error:
        return {"error": "refusal", "reason": str(error)}
    except SecurityError as error:
        return {"error": "forbidden", "reason": str(error), "line": _line(error)}
    except RecursionError as error:
        return {"error": "spent", "reason": "depth", "line": _line(error)}
    except Exception as error:  # a template is a program, and may fail in any way
        reason = f"{type(error).__name__}: {error}"[:300]
        return {"error": "failure", "reason": reason, "line": _line(error)}


def _render(template: Any, variables: dict[str, Any], most: int) -> str:
    blocks: list[str] = []
    for block in template.generate(**variables):
        blocks.append(block)
        most -= len(block)
        if most < 0:
            raise _Spent("characters")
    return "".join(blocks)


def _line(error: BaseException) -> int | None:
    """The template's line that was being run."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else None


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Limits what is computed in here to so many seconds of the processor's time."""
    try:
        import resource
    except ImportError:  # no POSIX; the other process watches the clock
        yield
        return

    def stop(*_: Any):
        raise _Spent("seconds")

    used = resource.getrusage(resource.RUSAGE_SELF)
    # What does not come back from a single operation is ended by the system, and the line is not known then.
    most = int(used.ru_utime + used.ru_stime) + seconds + 2
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    with contextlib.suppress(ValueError, OSError):  # where the hard limit is lower
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory(most: int):
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(file: BinaryIO) -> dict[str, Any] | None:
    head = file.read(8)
    if len(head) < 8:
        return None
    (length,) = struct.unpack("<Q", head)
    return json.loads(file.read(length))


def _write(file: BinaryIO, message: dict[str, Any]):
    content = json.dumps(message).encode()
    file.write(struct.pack("<Q", len(content)) + content)
    file.flush()


def main():
    """Answers requests until stdin ends."""
    # Ctrl-C is for the program that asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory(int(sys.argv[1]))
    # Nothing but answers may come out.
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while (request := _read(source)) is not None:
        _write(sink, _answer(request))


if __name__ == "__main__":
    main()
