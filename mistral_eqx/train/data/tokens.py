"""Tokens of documents, cached on disk."""

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
from .usable import OnBadRow, apply_to_row


# The version of the file format.
_FORMAT = 2
_ABOUT, _IDS, _OFFSETS = "about.json", "ids.bin", "offsets.npy"
# The digest of a tokenizer: its ids for this many texts, of each the first characters.
_SAMPLES, _BEGINNING = 16, 1000


class Tokens:
    """Documents as token ids, in one memory-mapped file.

    **Attributes:**

    - `folder`: the folder of the files.
    - `vocab`: all ids are below this.
    - `skipped`: a sentence for each row that was skipped.
    - `ids`: the ids of all documents, one after the other.
    - `offsets`: the start of each document, and the end of the last one.
    """

    folder: Path
    vocab: int
    skipped: list[str]
    ids: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " documents_and_end"]

    def __init__(self, folder: str | os.PathLike[str]):
        """**Arguments:**

        - `folder`: a folder that [`mistral_eqx.train.data.tokenise`][] wrote.

        **Raises:** `ValueError` if the folder has no tokens, or they are damaged.
        """
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / _ABOUT).read_text())
            self.vocab = about["vocab"]
            self.skipped = about.get("skipped", [])
            self.ids = np.memmap(self.folder / _IDS, np.dtype(about["dtype"]), mode="r")
            self.offsets = np.load(self.folder / _OFFSETS, mmap_mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{str(folder)!r} holds no tokens that can be read; delete it and tokenise again."
            ) from error
        if len(self.ids) != about["tokens"] or len(self.offsets) != about["documents"] + 1:
            raise InputError(f"The tokens in {str(folder)!r} are cut off; delete the folder and tokenise again.")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, " tokens"]:
        """The ids of a document."""
        if not 0 <= index < len(self):
            raise IndexError(f"There is no document {index} among {len(self)}.")
        # `np.array` makes a copy that does not keep the mapping.
        return np.array(self.ids[self.offsets[index] : self.offsets[index + 1]], np.int32)

    @property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        """The number of tokens of each document."""
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
    """Encodes texts once, and reads their tokens from disk from then on.

    Texts in files count as the same if the names, sizes and modification times of the files are the same, and texts in
    memory if their characters are. Tokenizers count as the same if they give the same ids for the first characters of
    16 texts. Each combination has its own subfolder, which appears when it is complete: an interrupted call starts
    again.

    **Arguments:**

    - `texts`: documents in files, or a list.
    - `encode`: returns the ids of one text.
    - `folder`: the folder of the subfolders; created if it does not exist.
    - `vocab`: the size of the model's vocabulary. Ids are stored in the smallest integer type that fits.
    - `end_id`: an id appended to each text, if given.
    - `on_bad_row`: for a row that cannot be read or encoded: `"refuse"` raises, `"skip"` continues without it and adds
        a sentence to `skipped` of the result.
    - `progress`: called after each text with the number of texts done, and of all texts.

    **Raises:** `ValueError` if there are no texts or all are empty, or an id is outside the vocabulary.
    """
    if not len(texts):
        raise InputError("There are no texts to tokenise; give at least one.")
    if end_id is not None and not 0 <= end_id < vocab:
        raise InputError(
            f"The end token {end_id} is outside the vocabulary of {vocab}; give an id of the model's vocabulary."
        )
    about = {
        "format": _FORMAT,
        "texts": _texts_digest(texts),
        "tokenizer": _tokenizer_digest(texts, encode, on_bad_row),
    }
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
            # Another process wrote the same tokens first.
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
                ids = np.asarray(apply_to_row(texts, number, encode), np.int64)
            except InputError as error:
                if on_bad_row == "refuse":
                    raise
                skipped.append(str(error))
                continue
            outside = ids[(ids < 0) | (ids >= vocab)]
            if len(outside):
                raise InputError(
                    f"Document {number} has the id {outside[0]}, outside the vocabulary of {vocab}; use the tokenizer "
                    "of the model."
                )
            if end_id is not None:
                ids = np.append(ids, end_id)
            file.write(ids.astype(dtype).tobytes())
            offsets.append(offsets[-1] + len(ids))
            if progress is not None:
                progress(number + 1, len(texts))
    if not offsets[-1]:
        raise InputError(f"All of {len(texts)} texts are empty; give others.")
    np.save(folder / _OFFSETS, np.asarray(offsets, np.int64))
    about = about | {"dtype": dtype.name, "documents": len(offsets) - 1, "tokens": offsets[-1]}
    about |= {"skipped": skipped}
    (folder / _ABOUT).write_text(json.dumps(about, indent=2))


def _texts_digest(texts: AbstractTexts | Sequence[Any]) -> str:
    if isinstance(texts, AbstractTexts):
        return texts.fingerprint()
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


def _tokenizer_digest(
    texts: AbstractTexts | Sequence[Any], encode: Callable[..., Sequence[int]], on_bad_row: OnBadRow
) -> str:
    """A digest of the ids that the tokenizer gives for some texts."""
    digest = hashlib.sha256()
    for number in np.unique(np.linspace(0, len(texts) - 1, _SAMPLES).astype(int)):
        try:
            ids = apply_to_row(
                texts, int(number), lambda text: encode(text[:_BEGINNING] if isinstance(text, str) else text)
            )
        except InputError:
            if on_bad_row == "refuse":
                raise
            continue
        digest.update(np.asarray(ids, np.int64).tobytes() + b"\n")
    return digest.hexdigest()
