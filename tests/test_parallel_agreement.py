"""What one process does alone; test_multi_host.py has what several do."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from mistral_eqx.parallel import agreement


def gathering(monkeypatch, values):
    """Makes this process one of several that hold these values."""

    def gather(digest):
        digests = [np.frombuffer(agreement.hashlib.sha256(value.encode()).digest(), np.uint8) for value in values]
        assert any(np.array_equal(digest, other) for other in digests)
        return np.stack(digests)

    monkeypatch.setattr(jax, "process_count", lambda: len(values))
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)


def test_one_process_agrees_with_itself():
    agreement.check_same("strategy", "kv_heads@tp")
    assert agreement.broadcast("a prompt") == "a prompt"
    assert agreement.broadcast(None) is None


def test_equal_values_pass(monkeypatch):
    gathering(monkeypatch, ["kv_heads@tp"] * 4)
    agreement.check_same("strategy", "kv_heads@tp")


@pytest.mark.parametrize(
    ("values", "who"),
    [
        ("aab", "2 differs"),
        ("abbb", "1, 2 and 3 differ"),
        ("abab", "1 and 3 differ"),
        ("a" * 20 + "b", "20 differs"),
        ("a" + "b" * 12, "1, 2, 3, 4, 5, 6, 7 and 5 more differ"),
    ],
)
def test_the_sentence_names_who_differs(monkeypatch, values, who):
    gathering(monkeypatch, list(values))
    for value in "ab":
        with pytest.raises(ValueError, match="is not the same") as error:
            agreement.check_same("strategy", value)
        assert str(error.value) == (
            f"The strategy is not the same on all processes: {who} from 0; start all of them with the same arguments "
            "and files."
        )


def test_a_text_cannot_be_shared_where_no_watch_connects_the_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"call mistral_eqx\.parallel\.initialize"):
        agreement.broadcast("a prompt")
