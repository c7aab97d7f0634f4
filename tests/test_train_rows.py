"""Rows of data: line ends, byte order marks, rows that cannot be used, and runs that go on with others."""

import pytest

from mistral_eqx.cli.recipe import read_recipe
from mistral_eqx.errors import InputError
from mistral_eqx.train import data
from mistral_eqx.train.lock import lock_folder


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks_are_alike(tmp_path, end, mark):
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes(mark + b"one\ntwo\n\nthree\n\nfour\n".replace(b"\n", end))
    lines.write_bytes(mark + b'{"text": "a"}\n{"text": "b"}\n\n'.replace(b"\n", end))
    assert list(map(data.TextFile(text, separator="\n\n").__getitem__, range(3))) == ["one\ntwo", "three", "four\n"]
    assert data.TextFile(text)[0] == "one\ntwo\n\nthree\n\nfour\n"
    found = data.JSONLines(lines)
    assert [found[number] for number in range(len(found))] == ["a", "b"]


def test_a_row_that_cannot_be_used_is_named_or_left_out(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"other": "b"}\n{"text": "c"}\n')

    def encode(text):
        return [ord(text), 1]

    with pytest.raises(InputError, match=r"Line 2 of .*a\.jsonl"):
        data.tokenise(data.JSONLines(file), encode, tmp_path / "tokens", vocab=128)
    found = data.tokenise(data.JSONLines(file), encode, tmp_path / "tokens", vocab=128, on_bad_row="skip")
    assert [list(found[number]) for number in range(len(found))] == [[97, 1], [99, 1]]
    assert len(found.skipped) == 1
    assert "Line 2" in found.skipped[0]
    usable = data.Usable(data.JSONLines(file), len, on_bad_row="skip")
    assert [usable[number] for number in range(len(usable))] == ["a", "c"]


_RECIPE = """folder = "run"
[model]
name = "gpt-nano"
[data]
kind = "sort"
rows = 8
[optimizer]
learning_rate = 1e-3
[training]
steps = 3
"""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.learning_rate", "nan"),
        ("optimizer.learning_rate", "-1.0"),
        ("optimizer.b1", "1.0"),
        ("training.z_loss", "inf"),
        ("training.label_smoothing", "-0.1"),
        ("training.clip", "-1"),
        ("training.save_every", "0"),
        ("training.zero", "4"),
        ("model.seed", str(2**80)),
        ("data.rows", "true"),
        ("data.kind", "'none'"),
    ],
)
def test_an_entry_out_of_its_range_is_named(tmp_path, name, value):
    path = tmp_path / "recipe.toml"
    path.write_text(_RECIPE)
    with pytest.raises(InputError, match=name):
        read_recipe(path, [f"{name}={value}"])


def test_one_process_a_run(tmp_path):
    with lock_folder(tmp_path), pytest.raises(InputError, match="trains in"), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        pass
