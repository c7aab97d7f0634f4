"""The process that renders chat templates: `templates.py` starts it, writes requests and reads answers.

It imports jinja2, and nothing of this package. A template comes with a checkpoint and is not trusted. In this process
it has no access to file contents, secrets or devices, and the operating system limits its processor time and memory.
"""

import json
import os
import resource
import signal
import struct
import sys
import traceback
from datetime import datetime
from functools import lru_cache

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Refusal(TemplateError):
    """A template called `raise_exception`."""


class TooLong(Exception):
    """The output of a template is longer than the limit."""


class TooSlow(BaseException):
    """A template exceeds its time limit. This is not an `Exception`, so that no jinja2 filter catches it."""


class VisibleNamespace(Namespace):
    """A namespace that refuses names with a leading underscore, which the sandbox does not check there."""

    def __init__(*args, **kwargs):  # a template may use the name `self`
        self, *rest = args
        Namespace.__init__(self, *rest, **kwargs)
        for name in dict(*rest, **kwargs):
            _check_visible(name)

    def __setitem__(self, name, value):
        _check_visible(name)
        Namespace.__setitem__(self, name, value)


def _check_visible(name):
    if str(name).startswith("_"):
        raise SecurityError(f"it sets {name!r} on a namespace.")


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox that raises when a template reads a forbidden attribute, and not only when it uses the value."""

    def unsafe_undefined(self, obj, attribute):
        raise SecurityError(f"it uses {attribute!r} of a {type(obj).__name__}.")


class Generation(Extension):
    """Puts marks around the generation blocks of a template, if the request has marks."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own form)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks: list[nodes.Expr] = [nodes.Name(f"generation_{side}", "load") for side in ("start", "end")]
        # As in transformers, the block has its own scope: variables set in it are not visible after it.
        return nodes.CallBlock(self.call_method("marked", marks), [], [], body).set_lineno(line)

    def marked(self, start, end, caller):
        return f"{start}{caller()}{end}"


@lru_cache(maxsize=8)
def compiled(template):
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, Generation])
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": VisibleNamespace,
    }
    return environment.from_string(template)


def stop(*_):
    raise TooSlow


def refuse(message):
    raise Refusal(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON without escaping for HTML, unlike jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def answer(request):
    """Renders a request: `{"text": ...}`, or for an error `{"kind": ..., "message": ..., "line": ...}`."""
    try:
        return {"text": _rendered(request)}
    except TooLong:
        kind, message, line = "long", "", None
    except TooSlow as error:
        # jinja2 translates line numbers only for an `Exception`.
        kind, message, line = "time", "", _line(error)
        line = None if line is None else compiled(request["template"]).get_corresponding_lineno(line)
    except Refusal as error:
        kind, message, line = "refusal", error, None
    except TemplateSyntaxError as error:
        kind, message, line = "syntax", error, error.lineno
    except SecurityError as error:
        kind, message, line = "forbidden", error, _line(error)
    except MemoryError as error:
        kind, message, line = "memory", "", _line(error)
    except RecursionError as error:
        kind, message, line = "deep", "", _line(error)
    except Exception as error:  # a template is a program, and may fail in any way
        kind, message, line = "failed", f"{type(error).__name__}: {error}", _line(error)
    return {"kind": kind, "message": str(message)[:500], "line": line}


def _rendered(request):
    parts, length = [], 0
    for part in compiled(request["template"]).generate(request["variables"]):
        parts.append(part)
        length += len(part)
        if length > request["longest"]:
            raise TooLong
    return "".join(parts)


def _line(error):
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else None


def main(seconds, memory):
    """Answers requests until the end of the input. A request is its length in four bytes, then JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    requests, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    while len(head := requests.read(4)) == 4:
        request = json.loads(requests.read(struct.unpack("<I", head)[0]))
        used = resource.getrusage(resource.RUSAGE_SELF)
        # The kernel kills this process at this limit, whatever the process does.
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 2, hard))
        # This timer expires earlier, so that the process can still report the line.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        result = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        content = json.dumps(result).encode()
        answers.write(struct.pack("<I", len(content)) + content)
        answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
