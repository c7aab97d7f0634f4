"""Figures in files that any program reads."""

import csv
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax

from ...errors import InputError
from ..callback import Callback, Run


class CSV(Callback):
    """Writes figures to `training.csv` and `evaluation.csv`, a line each time, at once.

    A run that goes on from a checkpoint goes on in the same files: lines of steps that are made again are taken out.

    **Arguments:**

    - `folder`: where; the run's own folder unless given.
    """

    def __init__(self, folder: str | Path | None = None):
        self._folder = folder

    def on_start(self, run: Run):
        for path in (self._path(run, "training"), self._path(run, "evaluation")):
            if path.is_file() and jax.process_index() == 0:
                _keep(path, run.step)

    def on_log(self, run: Run, figures: Mapping[str, float]):
        self._write(self._path(run, "training"), run, figures)

    def on_evaluation(self, run: Run, figures: Mapping[str, float]):
        self._write(self._path(run, "evaluation"), run, figures)

    def _path(self, run: Run, name: str) -> Path:
        folder = run.folder if self._folder is None else Path(self._folder)
        if folder is None:
            raise InputError("There is no folder for the figures; name one, or give the trainer a checkpoint_dir.")
        return folder / f"{name}.csv"

    def _write(self, path: Path, run: Run, figures: Mapping[str, float]):
        if jax.process_index() > 0:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", newline="") as file:
                lines = csv.writer(file)
                if file.tell() == 0:
                    lines.writerow(["step", *figures])
                lines.writerow([run.step, *(f"{figure:.9g}" for figure in figures.values())])
        except OSError as error:
            # Figures are never worth the model that is trained.
            warnings.warn(f"Figures of step {run.step} are lost: {path}: {error.strerror or error}.", stacklevel=2)


def _keep(path: Path, steps: int):
    """Takes out the lines behind a step, and one that was cut off."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *lines = csv.reader(file)
        if head[:1] != ["step"]:
            raise ValueError
        kept = [line for line in lines if len(line) == len(head) and int(line[0]) <= steps]
    except (ValueError, csv.Error, IndexError):
        # What another program wrote, or a cut-off disk left, is put aside and not lost.
        if path.stat().st_size:
            path.replace(path.with_suffix(".csv.foreign"))
        else:
            path.unlink()
        return
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        csv.writer(file).writerows([head, *kept])
    part.replace(path)
