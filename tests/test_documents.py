"""Files that are read whole, within limits."""

import os
import socket

import pytest

from mistral_eqx import InputError
from mistral_eqx.documents import DEEPEST, depth, parse_json, read_bytes, read_json, read_text, read_toml, shown


@pytest.fixture
def path(tmp_path):
    return tmp_path / "settings.json"


def test_a_json_object_and_a_byte_order_mark(path):
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, null]}')
    assert read_json(path) == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]", "5", "null", '{"a": NaN}', '{"a": Infinity}', '{"a": -Infinity}', '{"a": 1e400}'),
        *('{"a": 1, "a": 1}', '{"a": ' + "9" * 5000 + "}", "[" * 10**5, '{"a":' * 10**5, "\ufeff\ufeff{}"),
        '{"a": ' + "[" * DEEPEST + "]" * DEEPEST + "}",
    ],
)
def test_what_is_no_json_object_is_refused_with_the_file(path, text):
    path.write_text(text)
    with pytest.raises(InputError, match=r"settings\.json") as caught:
        read_json(path)
    assert caught.value.file == str(path)
    assert len(str(caught.value)) < 500


def test_as_deep_as_is_allowed(path):
    path.write_text('{"a": ' + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1) + "}")
    assert depth(read_json(path)) == DEEPEST


@pytest.mark.parametrize(("value", "levels"), [(1, 0), ([], 1), ([1, "[["], 1), ({"a": [1, {"b": []}]}, 4)])
def test_depth(value, levels):
    assert depth(value) == levels


@pytest.mark.parametrize("text", ["a = " + "[" * 10**5, "a = [1", "a" + ".a" * 5000 + " = 1", "a = 1\na = 2"])
def test_toml_that_is_wrong_or_too_deep(tmp_path, text):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(InputError, match=r"r\.toml' is not valid TOML"):
        read_toml(tmp_path / "r.toml")


def test_text_that_is_not_utf8_names_the_byte(path):
    path.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"settings\.json' is not UTF-8 text.* at byte 3"):
        read_text(path)


def test_what_has_no_end_is_not_read(path, tmp_path):
    os.mkfifo(path)
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for odd in (path, tmp_path / "zero", tmp_path / "socket", tmp_path):
            with pytest.raises(InputError, match="not a file"):
                read_bytes(odd)


def test_a_file_that_is_too_large_is_not_read(path):
    with open(path, "wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(InputError, match=r"settings\.json' is larger than 16 MB"):
        read_bytes(path)
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(InputError, match="larger than 4 bytes"):
        read_bytes(path, 4)


def test_a_message_may_name_a_line_and_a_remedy():
    with pytest.raises(InputError, match=r"Line 3 is not valid JSON \(.*\); write one object a line\."):
        parse_json("{", "Line 3", remedy="write one object a line")


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "'a'"), ("\x1b[2J", "'\\x1b[2J'"), (1.5, "1.5")],
)
def test_values_in_messages(value, text):
    assert shown(value) == text
    assert len(shown("x" * 10**6)) == 80
    assert shown(10**5000) == "a very large int"
