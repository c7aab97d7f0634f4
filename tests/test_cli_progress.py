import io
import sys

from rich.console import Console

from mistral_eqx.cli import progress


def terminal(monkeypatch):
    """What a bar sees as the terminal on stderr."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(progress, "Console", lambda **options: screen)
    return screen.file


def test_trap_what_is_printed_beside_a_bar_stays_on_stdout(monkeypatch, capsys):
    screen = terminal(monkeypatch)
    with progress.progress_bar("Generating", counts=True) as report:
        report(3, 7)
        sys.stdout.write("a line of a product\n")
    assert capsys.readouterr().out == "a line of a product\n"
    assert "3/7" in screen.getvalue()
    assert "product" not in screen.getvalue()


def test_a_bar_that_is_not_to_be_shown_is_not(monkeypatch):
    screen = terminal(monkeypatch)
    with progress.progress_bar("Generating", shown=False) as report:
        report(3, 7)
    assert screen.getvalue() == ""
