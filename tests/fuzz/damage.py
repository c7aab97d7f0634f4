"""Damages valid content, from a random number generator alone: the same seed gives the same damage."""

import json
import random
import re
from typing import Any


# Sizes, offsets and counts that programs get wrong, as eight bytes of a file.
EDGES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
# JSON texts in the place of a value. Some of them are not JSON.
VALUES = (
    *("null", "true", "false", "0", "-1", "1", "1.5", "-0.0", "1e-320", "1e400", "NaN", "-Infinity"),
    *("2147483648", "9223372036854775808", "1" + "0" * 400, '""', '" "', '"x"', '"false"', '"\\u0000"', '"\\ud800"'),
    *('"[/bold]"', '"' + "a" * 5000 + '"', "[]", "[1]", '["a"]', "[[]]", "{}", '{"a": 1}', "[" * 100 + "]" * 100, "["),
)
# The same of TOML, as far as it is written in another way.
TOML_VALUES = (
    *("true", "0", "-1", "1", "1.5", "nan", "inf", "-inf", "1e400", "9223372036854775808", '""', '"x"', "[]", "[1]"),
    *('["a"]', "{}", "{a = 1}", "1979-05-27", "[" * 100 + "]" * 100, "["),
)
TEXTS = (
    *("", " ", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e400", "1_0", "0x10", "\u0663", "x", "9" * 30),
    *("a" * 5000, "\u00e9", "tp=0", "tp=2", "heads", "kv_heads@tp", "..", "/dev/null", "a b"),
)


def damaged_bytes(content: bytes, numbers: random.Random, head: int | None = None) -> bytes:
    """One to eight changes: bits, bytes, cuts, insertions, copies, edge values.

    **Arguments:**

    - `content`: of a valid file.
    - `numbers`: chooses.
    - `head`: nine of ten changes fall into so many bytes at the beginning, where a format keeps its tables.
    """
    data = bytearray(content)

    def at() -> int:
        inside = min(len(data), head or len(data)) if numbers.random() < 0.9 else len(data)
        return numbers.randrange(max(inside, 1))

    change = numbers.choice(("bits", "bits", "bytes", "bytes", "cut", "remove", "insert", "copy", "edge"))
    for _ in range(numbers.choice((1, 1, 1, 2, 8))):
        if not data:
            break
        place, size = at(), numbers.choice((1, 2, 4, 8, 50))
        if change == "bits":
            data[place] ^= 1 << numbers.randrange(8)
        elif change == "bytes":
            data[place] = numbers.choice((0, 1, 0x7F, 0x80, 0xFF, numbers.randrange(256)))
        elif change == "cut":
            del data[numbers.randrange(len(data)) :]
        elif change == "remove":
            del data[place : place + size]
        elif change == "insert":
            data[place:place] = numbers.randbytes(size)
        elif change == "copy":
            other = at()
            data[place : place + size] = data[other : other + size]
        else:
            data[place : place + 8] = numbers.choice(EDGES).to_bytes(8, "little")
    return bytes(data)


def damaged_json(content: bytes, numbers: random.Random) -> bytes:
    """A value replaced, a key removed, written twice or renamed; now and then bytes."""
    if numbers.random() < 0.2:
        return damaged_bytes(content, numbers)
    document = json.loads(content)
    places = list(_places(document))
    for mark in range(numbers.choice((1, 1, 2))):
        holder, key = numbers.choice(places)
        change = numbers.random()
        if change < 0.7:
            holder[key] = f"<value {mark}>"
        elif change < 0.85 and key in (holder if isinstance(holder, dict) else range(len(holder))):
            del holder[key]
        elif isinstance(holder, dict):
            holder[numbers.choice(("", "x", "\x00", "a" * 300, key + "2"))] = 1
    text = json.dumps(document)
    return re.sub(r'"<value \d>"', lambda _: numbers.choice(VALUES), text).encode()


def _places(value: Any):
    """Each place in a document that has a value, as its holder and key; of long ones the first."""
    keys = list(value)[:300] if isinstance(value, dict) else range(min(len(value), 60))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def damaged_json_lines(content: bytes, numbers: random.Random) -> bytes:
    """One of several lines damaged, or their ends."""
    lines = content.splitlines(keepends=True)
    at = numbers.randrange(len(lines))
    if numbers.random() < 0.2:
        end = numbers.choice((b"", b"\r\n", b"\r", b"\n\n", b"\x0b\n", b"\x00\n"))
        lines[at] = lines[at].rstrip() + end
    else:
        lines[at] = damaged_json(lines[at].rstrip(), numbers) + b"\n"
    return b"".join(lines)


def damaged_toml(content: bytes, numbers: random.Random) -> bytes:
    """The value of one entry replaced, an entry removed or written twice; now and then bytes."""
    if numbers.random() < 0.15:
        return damaged_bytes(content, numbers)
    lines = content.decode().splitlines()
    at = numbers.choice([number for number, line in enumerate(lines) if "=" in line])
    name = lines[at].partition("=")[0]
    change = numbers.random()
    if change < 0.8:
        lines[at] = f"{name}= {numbers.choice(TOML_VALUES)}"
    elif change < 0.9:
        del lines[at]
    else:
        lines.insert(at, lines[at])
    return "\n".join(lines).encode()
