"""Texts as tokens, on disk."""

import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ...errors import InputError
from .texts import AbstractTexts
from .usable import OnBadRow, use


# Changes when the files of a cache do.
_FORMAT = 2
_ABOUT, _IDS, _OFFSETS = "about.json", "ids.bin", "offsets.npy"
# A tokenizer is known by what it makes of the beginnings of so many texts, of so many characters each.
_SAMPLES, _BEGINNING = 16, 1000


class Tokens:
    """Documents as token ids, in one file that is mapped into memory and not read in.

    **Attributes:**

    - `folder`: where they are.
    - `vocab`: all ids are below this.
    - `skipped`: a sentence for each row that was left out.
    - `ids`: of all documents, one after the other.
    - `offsets`: where each document starts, and where the last one stops.
    """

    folder: Path
    vocab: int
    skipped: list[str]
    ids: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " documents_and_end"]

    def __init__(self, folder: str | os.PathLike[str]):
        """**Arguments:**

        - `folder`: one that [`mistral_eqx.train.data.tokenise`][] wrote.

        **Raises:** `ValueError` if it is none, or damaged.
        """
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / _ABOUT).read_text())
            self.vocab = about["vocab"]
            self.skipped = about.get("skipped", [])
            self.ids = np.memmap(self.folder / _IDS, np.dtype(about["dtype"]), mode="r")
            self.offsets = np.load(self.folder / _OFFSETS, mmap_mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{str(folder)!r} holds no tokens to be read; delete it and tokenise again.") from error
        if len(self.ids) != about["tokens"] or len(self.offsets) != about["documents"] + 1:
            raise InputError(f"The tokens in {str(folder)!r} are cut off; delete the folder and tokenise again.")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, " tokens"]:
        """The ids of a document."""
        if not 0 <= index < len(self):
            raise IndexError(f"There is no document {index} among {len(self)}.")
        # A copy that is no mapping, which numpy would carry along.
        return np.array(self.ids[self.offsets[index] : self.offsets[index + 1]], np.int32)

    @property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        """How many tokens each document has."""
        return np.diff(self.offsets)


def tokenise(
    texts: AbstractTexts | Sequence[Any],
    encode: Callable[..., Sequence[int]],
    folder: str | os.PathLike[str],
    *,
    vocab: int,
    end_id: int | None = None,
    on_bad_row: OnBadRow = "refuse",
    progress: Callable[[int, int], None] | None = None,
) -> Tokens:
    """Encodes texts once, and finds their tokens on disk from then on.

    What was written for these texts and this tokenizer is taken again. Texts are the same if their files' names, sizes
    and times of change are, and texts in memory if their characters are; a tokenizer is the same if it makes the same
    of the beginnings of 16 of them. Tokens of others stay beside them, each in a folder of its own, which is there once
    all of it is: what is interrupted is made again.

    **Arguments:**

    - `texts`: of files, or a list.
    - `encode`: gives the ids of one text.
    - `folder`: where folders of tokens are kept; made if it is not there.
    - `vocab`: the model's number of ids. They are kept in as many bytes as it takes.
    - `end_id`: put behind each text, if given.
    - `on_bad_row`: what becomes of a row that cannot be read or encoded: `"refuse"`, or `"skip"` to go on without it;
        `skipped` of the result has a sentence for each.
    - `progress`: called after each text with how many are done, and how many there are.

    **Raises:** `ValueError` if there are no texts or all are empty, or an id is outside of the vocabulary.
    """
    if not len(texts):
        raise InputError("There are no texts to tokenise; give at least one.")
    if end_id is not None and not 0 <= end_id < vocab:
        raise InputError(f"The end token {end_id} is outside of the vocabulary of {vocab}; give an id of the model's.")
    about = {"format": _FORMAT, "texts": _known_by(texts), "tokenizer": _samples(texts, encode, on_bad_row)}
    about |= {"vocab": vocab, "end_id": end_id, "on_bad_row": on_bad_row}
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    done = Path(folder) / name
    if done.exists():
        return Tokens(done)
    partial = done.with_name(f".{name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        _write(texts, encode, partial, about, vocab, end_id, on_bad_row, progress)
        try:
            partial.rename(done)
        except OSError:
            # Another process was faster with the same.
            if not done.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Tokens(done)


def _write(
    texts: AbstractTexts | Sequence[Any],
    encode: Callable[..., Sequence[int]],
    folder: Path,
    about: dict[str, Any],
    vocab: int,
    end_id: int | None,
    on_bad_row: OnBadRow,
    progress: Callable[[int, int], None] | None,
):
    dtype = np.min_scalar_type(vocab - 1)
    offsets, skipped = array("q", [0]), list[str]()
    with (folder / _IDS).open("wb") as file:
        for number in range(len(texts)):
            try:
                ids = np.asarray(use(texts, number, encode), np.int64)
            except InputError as error:
                if on_bad_row == "refuse":
                    raise
                skipped.append(str(error))
                continue
            outside = ids[(ids < 0) | (ids >= vocab)]
            if len(outside):
                raise InputError(
                    f"Document {number} has the id {outside[0]}, outside of the vocabulary of {vocab}; take the "
                    "tokenizer that belongs to the model."
                )
            if end_id is not None:
                ids = np.append(ids, end_id)
            file.write(ids.astype(dtype).tobytes())
            offsets.append(offsets[-1] + len(ids))
            if progress is not None:
                progress(number + 1, len(texts))
    if not offsets[-1]:
        raise InputError(f"All of {len(texts)} texts are empty, so there is nothing to learn; give others.")
    np.save(folder / _OFFSETS, np.asarray(offsets, np.int64))
    about = about | {"dtype": dtype.name, "documents": len(offsets) - 1, "tokens": offsets[-1]}
    about |= {"skipped": skipped}
    (folder / _ABOUT).write_text(json.dumps(about, indent=2))


def _known_by(texts: AbstractTexts | Sequence[Any]) -> str:
    if isinstance(texts, AbstractTexts):
        return texts.fingerprint()
    content = hashlib.sha256()
    for text in texts:
        content.update(json.dumps(text).encode() + b"\n")
    return content.hexdigest()


def _samples(texts: AbstractTexts | Sequence[Any], encode: Callable[..., Sequence[int]], on_bad_row: OnBadRow) -> str:
    """What the tokenizer makes of some texts."""
    made = hashlib.sha256()
    for number in np.unique(np.linspace(0, len(texts) - 1, _SAMPLES).astype(int)):
        try:
            ids = use(texts, int(number), lambda text: encode(text[:_BEGINNING] if isinstance(text, str) else text))
        except InputError:
            if on_bad_row == "refuse":
                raise
            continue
        made.update(np.asarray(ids, np.int64).tobytes() + b"\n")
    return made.hexdigest()
