"""Renders chat templates in a process of its own: `templates.py` starts it, writes requests and reads answers.

It imports jinja2 and nothing of this package. A template comes with a checkpoint and may be anyone's: here it finds no
files' contents, no secrets and no devices, and the operating system bounds its processor time and its memory.
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
    """A template's own objection."""


class TooLong(Exception):
    """A template writes more than it may."""


class TooSlow(BaseException):
    """A template takes too long. It is no `Exception`, so that no filter takes it for a wrong value."""


class VisibleNamespace(Namespace):
    """A namespace without hidden names, which the sandbox would not watch."""

    def __init__(*args, **kwargs):  # `self` may be one of the names
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
    """A sandbox that refuses a forbidden name where it is used, not only what is done with it."""

    def unsafe_undefined(self, obj, attribute):
        raise SecurityError(f"it uses {attribute!r} of a {type(obj).__name__}.")


class Generation(Extension):
    """Puts marks around what a template says is the assistant's, if the request has marks."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own form)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks: list[nodes.Expr] = [nodes.Name(f"generation_{side}", "load") for side in ("start", "end")]
        # A block of its own, as in transformers: what is set in it is not known behind it.
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
    """JSON as such; jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def answer(request):
    """What a request comes to: `{"text": ...}`, or `{"kind": ..., "said": ..., "line": ...}`."""
    try:
        return {"text": _rendered(request)}
    except TooLong:
        kind, said, line = "long", "", None
    except TooSlow as error:
        # jinja2 translates the lines of what is an `Exception`.
        kind, said, line = "time", "", _line(error)
        line = None if line is None else compiled(request["template"]).get_corresponding_lineno(line)
    except Refusal as error:
        kind, said, line = "refusal", error, None
    except TemplateSyntaxError as error:
        kind, said, line = "syntax", error, error.lineno
    except SecurityError as error:
        kind, said, line = "forbidden", error, _line(error)
    except MemoryError as error:
        kind, said, line = "memory", "", _line(error)
    except RecursionError as error:
        kind, said, line = "deep", "", _line(error)
    except Exception as error:  # a template is a program, and may fail in any way
        kind, said, line = "failed", f"{type(error).__name__}: {error}", _line(error)
    return {"kind": kind, "said": str(said)[:500], "line": line}


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
    """Answers requests, each four bytes of length and JSON, until there are no more."""
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
        # Past it the kernel ends this process, whatever it does.
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 2, hard))
        # A second before, it can still say in which line it is.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        told = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        content = json.dumps(told).encode()
        answers.write(struct.pack("<I", len(content)) + content)
        answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
