"""The exception for what a user can put right."""

import pickle

import pytest

import mistral_eqx as mx


def test_it_is_a_value_error_with_file_key_and_remedy(tmp_path):
    error = mx.InputError("There are no layers.", file=tmp_path, key="num_hidden_layers", remedy="fetch it again")
    assert isinstance(error, ValueError)
    assert str(error) == "There are no layers; fetch it again."
    assert (error.file, error.key, error.remedy) == (str(tmp_path), "num_hidden_layers", "fetch it again")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\ntwo", "one two"),
        ("a \x1b[2J name", "a \\x1b[2J name"),
        ("half \ud800", "half \\ud800"),
        ("h\u00e9llo \u5929", "h\u00e9llo \u5929"),
    ],
)
def test_a_message_is_one_line_that_a_terminal_can_show(text, shown):
    assert str(mx.InputError(text)) == shown


def test_a_message_of_megabytes_keeps_its_beginning_and_its_end():
    text = str(mx.InputError(f"The tensor {'x' * 10**7} is unknown; delete it."))
    assert len(text) <= 1000
    assert text.startswith("The tensor xxx")
    assert text.endswith("is unknown; delete it.")


def test_it_can_be_sent_to_another_process():
    again = pickle.loads(pickle.dumps(mx.InputError("a", file="b", key="c", remedy="d")))
    assert (str(again), again.file, again.key, again.remedy) == ("a; d.", "b", "c", "d")
