"""Metrics in CSV files."""

import csv
import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax

from ...errors import InputError
from ..callback import Callback, Run


class CSV(Callback):
    """Writes metrics to `training.csv` and `evaluation.csv`, one line per step, without buffering.

    A run that continues from a checkpoint appends to the same files, after it has removed the lines of later steps.

    **Arguments:**

    - `folder`: the folder of the files; the run's folder unless given.
    """

    def __init__(self, folder: str | Path | None = None):
        self._folder = folder

    def on_start(self, run: Run):
        for path in (self._path(run, "training"), self._path(run, "evaluation")):
            if path.is_file() and jax.process_index() == 0:
                _drop_lines_after(path, run.step)

    def on_log(self, run: Run, metrics: Mapping[str, float]):
        self._write(self._path(run, "training"), run, metrics)

    def on_evaluation(self, run: Run, metrics: Mapping[str, float]):
        self._write(self._path(run, "evaluation"), run, metrics)

    def _path(self, run: Run, name: str) -> Path:
        folder = run.folder if self._folder is None else Path(self._folder)
        if folder is None:
            raise InputError("There is no folder for the metrics; give CSV a folder, or the trainer a checkpoint_dir.")
        return folder / f"{name}.csv"

    def _write(self, path: Path, run: Run, metrics: Mapping[str, float]):
        if jax.process_index() > 0:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and _head(path) not in ("", ",".join(["step", *metrics])):
                _set_aside(path)
            with path.open("a", newline="") as file:
                lines = csv.writer(file)
                if file.tell() == 0:
                    lines.writerow(["step", *metrics])
                lines.writerow([run.step, *(f"{value:.9g}" for value in metrics.values())])
        except OSError as error:
            # A full disk must not end the training.
            warnings.warn(f"Metrics of step {run.step} are lost: {path}: {error.strerror or error}.", stacklevel=2)


def _head(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n")


def _set_aside(path: Path):
    """Renames a file of another program or with other columns, so that a new one can begin."""
    names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    kept = next(file for name in names if not (file := path.with_suffix(f".csv.foreign{name}")).exists())
    path.replace(kept)
    warnings.warn(f"{path} is damaged or has other columns; it is kept as {kept}, and a new one begins.", stacklevel=2)


def _drop_lines_after(path: Path, step: int):
    """Removes the lines of later steps, and a last line that was cut off."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *lines = csv.reader(file)
        if head[:1] != ["step"]:
            raise ValueError
        kept = [line for line in lines if len(line) >= len(head) and int(line[0]) <= step]
    except (ValueError, csv.Error, IndexError):
        if path.stat().st_size:
            _set_aside(path)
        else:
            path.unlink()
        return
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        csv.writer(file).writerows([head, *kept])
    part.replace(path)
