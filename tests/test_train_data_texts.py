"""Texts of files, found one by one; what is wrong with a file is said."""

import importlib.util
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.generation import refused

from mistral_eqx.train import data


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path, records):
    return write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def everything(texts):
    """All documents, the last one first, so that none is found by reading on."""
    return [texts[index] for index in reversed(range(len(texts)))][::-1]


def test_a_text_file_is_one_document_or_several(tmp_path):
    one = write(tmp_path / "one.txt", "Call me Ishmaël.\n\nSome years ago\n\n\n\n never mind\n\n \n\n")
    two = write(tmp_path / "two.txt", "It is a way I have.")
    assert everything(data.TextFile(one)) == [one.read_text()]
    assert everything(data.TextFile([one, two])) == [one.read_text(), two.read_text()]
    parts = ["Call me Ishmaël.", "Some years ago", " never mind", "It is a way I have."]
    assert everything(data.TextFile([one, two], separator="\n\n")) == parts
    assert everything(data.TextFile(two, separator="way")) == ["It is a ", " I have."]


def test_json_lines(tmp_path):
    one = lines(tmp_path / "one.jsonl", [{"text": "Ähren\u2028\n", "n": 1}, {"text": ""}])
    two = write(tmp_path / "two.jsonl", '{"text": "last, without a line end"}')
    write(blank := tmp_path / "blank.jsonl", '{"text": "a"}\r\n\n \n')
    texts = data.JSONLines([one, two, blank])
    assert everything(texts) == ["Ähren\u2028\n", "", "last, without a line end", "a"]
    talks = data.JSONLines(lines(tmp_path / "chat.jsonl", [{"messages": CHAT}]), field="messages")
    assert talks[0] == CHAT


def test_parquet(tmp_path):
    texts = [f"text {number} ä" for number in range(7)]
    for name, part in (("a", texts[:5]), ("b", texts[5:])):
        pq.write_table(pa.table({"text": part, "n": range(len(part))}), tmp_path / f"{name}.parquet", row_group_size=2)
    found = data.Parquet([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert everything(found) == texts
    assert [found[index] for index in (6, 0, 5, 1, 4)] == [texts[index] for index in (6, 0, 5, 1, 4)]
    pq.write_table(pa.table({"messages": [CHAT, None]}), tmp_path / "chat.parquet")
    talks = data.Parquet(tmp_path / "chat.parquet", column="messages")
    assert talks[0] == CHAT
    with refused("Row 2 of", "'messages'", "neither"):
        talks[1]


def test_entries_outside_are_not_there(tmp_path):
    """A list's end is found by an `IndexError`, on which iteration relies."""
    texts = data.TextFile(write(tmp_path / "a.txt", "a b"), separator=" ")
    assert [*texts] == ["a", "b"]
    with pytest.raises(IndexError):
        texts[-1]


def test_files_are_not_held_in_memory(tmp_path):
    """Of 8 MB in 80 documents, one or two at a time."""
    records = [{"text": f"{number}" * 100_000} for number in range(10)] * 8
    path = lines(tmp_path / "a.jsonl", records)
    size = path.stat().st_size
    assert size > 8_000_000
    for make in (data.JSONLines, lambda path: data.TextFile(path, "\n")):
        tracemalloc.start()
        texts = make(path)
        assert len(texts) == 80
        assert "7" * 1000 in str(texts[77])
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < size / 10


def test_a_fingerprint_tells_files_and_how_they_are_read_apart(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "a", "b": "c"}])
    prints = [texts.fingerprint() for texts in (data.JSONLines(path), data.JSONLines(path, "b"), data.TextFile(path))]
    prints.append(data.TextFile(path, "\n").fingerprint())
    assert len(set(prints)) == 4
    assert data.JSONLines(path).fingerprint() == prints[0]
    lines(path, [{"text": "a", "b": "cc"}])
    assert data.JSONLines(path).fingerprint() != prints[0]


def test_files_that_are_not_there_or_empty_are_refused(tmp_path):
    empty, blank = write(tmp_path / "empty", ""), write(tmp_path / "blank", "\n\n\n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for kind in (data.TextFile, data.JSONLines, data.Parquet):
        with refused("no file", "away", "check the path"):
            kind(tmp_path / "away")
        with refused("no files"):
            kind([])
    for make in (data.TextFile, data.JSONLines):
        with refused("no documents", "empty"):
            make(empty)
    with refused("no documents", "2 files"):
        data.JSONLines([empty, blank])
    with refused("no documents"):
        data.TextFile(blank, separator="\n\n")
    with refused("no rows"):
        data.Parquet(tmp_path / "none.parquet")
    with refused("separator"):
        data.TextFile(blank, separator="")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', ["is not valid JSON", "column"]),
        (b"", ["is not valid JSON"]),
        (b'{"text": "\xff"}', ["is not UTF-8"]),
        (b'["text"]', ["not a JSON object", "list"]),
        (b'{"txt": "a", "id": 1}', ["no field 'text'", "'txt', 'id'"]),
        (b'{"text": null}', ["'text'", "neither"]),
        (b'{"text": [{"content": "a"}]}', ["neither", "'role'"]),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, words):
    texts = data.JSONLines(write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n'))
    assert (texts[0], texts[2]) == ("a", "b")
    with refused("Line 2 of", *words):
        texts[1]


def test_other_wrong_files_are_named(tmp_path):
    with refused("not UTF-8", "byte 5"):
        data.TextFile(write(tmp_path / "a.txt", b"abc,d\xffe"), separator=",")[1]
    with refused("not a Parquet file"):
        data.Parquet(write(tmp_path / "a.parquet", "text"))
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "b.parquet")
    with refused("no column 'text'", "'body', 'n'"):
        data.Parquet(tmp_path / "b.parquet")
    with refused("Row 1 of", "'n'", "neither"):
        data.Parquet(tmp_path / "b.parquet", column="n")[0]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    with refused("the extra `parquet`", "pip install 'mistral-eqx[parquet]'"):
        data.Parquet(write(tmp_path / "a.parquet", "text"))
