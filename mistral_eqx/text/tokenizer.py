"""What every tokenizer can do, whichever file it came from."""

import abc
import functools
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from .. import interrupts
from ..checkpoint.staging import exclusive, hidden_beside, make_folder, restore
from ..errors import InputError
from .settings import FILES, GENERATION, write_settings
from .stops import StopRows
from .tokens import Ids


class AbstractTokenizer(abc.ABC):
    """Text to token ids and back.

    To write your own, set the attributes in `__init__` and define `encode_plain`, `token_bytes` and
    `write_vocabulary`.

    **Attributes:**

    - `name`: where the tokenizer came from, for messages.
    - `vocab`: number of token ids, from 0 to `vocab - 1`.
    - `bos_id`, `eos_ids`: the token that starts a text, if any, and those that end one.
    - `adds_bos`: whether `encode` starts with `bos_id` when it is not told.
    - `chat_template`: the jinja2 template that the file carries for conversations, if any.
    - `control_tokens`: the text of each token that means something to the model and is no text, with its id. A token
        that ends a text is one of them, whatever type its file gives it, unless it is a word that texts have, such as a
        line break.
    - `control_pattern`: finds control tokens in a text; what matches the group that took part is the token.
    - `release_file`: Mistral's own tokenizer file, if it came from one: it fixes the format of conversations.
    """

    name: str
    vocab: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: str | None
    control_tokens: Mapping[str, int]
    control_pattern: re.Pattern[str]
    release_file: Path | None

    @abc.abstractmethod
    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        """The ids of a text in which nothing is a control token.

        **Arguments:**

        - `text`: may be empty.
        - `first`: whether it begins what is being encoded; `False` for what follows a control token.

        **Returns:** the ids, without one for the beginning of the text.
        """

    @abc.abstractmethod
    def token_bytes(self, id: int, *, first: bool) -> bytes:
        """The bytes of UTF-8 that a token stands for, perhaps part of a character.

        **Arguments:**

        - `id`: less than `vocab` and not negative.
        - `first`: whether it is the first of a text; sentencepiece then drops the space that it adds when it encodes.

        **Returns:** its bytes; for a control token those of its name.
        """

    @abc.abstractmethod
    def write_vocabulary(self, folder: Path) -> Mapping[str, Any]:
        """Writes the tokens, for [`mistral_eqx.text.AbstractTokenizer.save`][].

        **Arguments:**

        - `folder`: an empty one.

        **Returns:** what `tokenizer_config.json` says beside the attributes, such as the `tokenizer_class` that
        transformers is to take.
        """

    @functools.cached_property
    def template_tokens(self) -> Mapping[str, str]:
        """The texts of tokens by the names that a chat template has for them, such as `bos_token`.

        These are the tokens that start and end a text; a tokenizer whose files name more has them all.
        """
        named = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        return {name: self.token_name(id) for name, id in named.items() if id is not None}

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that are never text: those of the control tokens and of all tokens that end a text."""
        return self._special_ids

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.control_tokens.values()) | frozenset(self.eos_ids)

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Turns text into token ids.

        **Arguments:**

        - `text`: any text, also the empty one.
        - `add_bos`: whether the ids start with `bos_id`; `None` does what the tokenizer's file says.
        - `parse_special`: whether the name of a control token in `text`, such as `<|im_start|>`, stands for that token.
            Without it such a name is text like any other, so that a user's words cannot pass for a template's.

        **Returns:** the ids.

        **Raises:** `ValueError` if `text` has half a surrogate pair, or `add_bos` asks for a token that there is not.
        """
        add_bos = self.adds_bos if add_bos is None else add_bos
        if add_bos and self.bos_id is None:
            raise InputError(f"{self.name} has no token for the beginning of a text; leave out add_bos=True.")
        ids = self.encode_segments(self.segments(text) if parse_special else [text])
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def segments(self, text: str) -> list[str | int]:
        """`text` cut at the control tokens that it names: plain texts, and the ids of the tokens between them."""
        segments, end = [], 0
        for match in self.control_pattern.finditer(text):
            segments += [text[end : match.start()], self.control_tokens[match[match.lastindex or 0]]]
            end = match.end()
        return [*segments, text[end:]]

    def encode_segments(self, segments: Iterable[str | int]) -> list[int]:
        """The ids of plain texts and of the control tokens between them."""
        ids: list[int] = []
        first = True
        for segment in segments:
            if isinstance(segment, int):
                ids.append(segment)
                first = False
            elif segment:
                try:
                    segment.encode()
                except UnicodeEncodeError as error:
                    raise InputError(
                        f"The text has half a surrogate pair at position {error.start}, which is no character; "
                        "read it with the right encoding."
                    ) from error
                ids += self.encode_plain(segment, first=first)
                first = False
        return ids

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = True, after: Ids = ()) -> str:
        """Turns token ids into text.

        ```python
        prompt = tokenizer.encode("The capital of France is")
        tokenizer.decode(new, after=prompt)  # " Paris", and without `after` the space could be missing
        ```

        **Arguments:**

        - `ids`: ints, or an integer array of one dimension.
        - `skip_special`: whether control tokens leave no trace; otherwise their names appear.
        - `after`: the ids that `ids` continue, such as a prompt's. A continuation keeps the space in front of its first
            word, which the first word of a text and the first after a control token lose where encoding adds it.

        **Returns:** the text; bytes that are no UTF-8 become U+FFFD. Ids past the vocabulary, with which many models
        pad their embedding, are no text.

        **Raises:** `ValueError` if an id is negative.
        """
        parts: list[bytes] = []
        begins = self.begins_text(after, skip_special=skip_special)
        for id in ids:
            id = self.checked_id(id)
            if id < self.vocab and not (skip_special and id in self.special_ids):
                parts.append(self.token_bytes(id, first=begins and not parts))
        return b"".join(parts).decode(errors="replace")

    def begins_text(self, after: Ids, *, skip_special: bool = True) -> bool:
        """Whether what follows these ids begins a text, so that its first word loses the space that encoding adds.

        **Arguments:**

        - `after`: all ids before, or the last of them.
        - `skip_special`: whether control tokens leave no trace.
        """
        return len(after) == 0 or (skip_special and operator.index(after[-1]) in self.special_ids)

    def token_name(self, id: int) -> str:
        """The text of a token by itself, a control token's name included; `""` for an id past the vocabulary."""
        return self.token_bytes(id, first=False).decode(errors="replace") if id < self.vocab else ""

    def checked_id(self, id: SupportsIndex) -> int:
        """`id` as an int.

        **Raises:** `ValueError` if it is negative.
        """
        id = operator.index(id)
        if id < 0:
            raise InputError(
                f"The token id {id} is outside the vocabulary of {self.vocab} of {self.name}; leave out padding, and "
                "the -1 of rows that have ended.",
                key="ids",
            )
        return id

    def find_stops(self, stop: str | Sequence[str], after: Sequence[Ids]) -> StopRows:
        """Watches for stop strings in the texts of rows, as their tokens come.

        **Arguments:**

        - `stop`: one string or several.
        - `after`: for each row the ids that it continues.

        **Raises:** `ValueError` if a stop string is empty.
        """
        return StopRows(self, stop, after)

    def save(self, folder: str | os.PathLike[str]):
        """Writes the files from which [`mistral_eqx.text.load_tokenizer`][] makes this tokenizer again.

        They are those of Hugging Face: the vocabulary as `tokenizer.json`, `tokenizer.model` or `tekken.json`, and
        `tokenizer_config.json` with the tokens that start and end a text and the chat template. Where several tokens
        end a text, `generation_config.json` lists them.

        **Arguments:**

        - `folder`: that of a model, or another. It is made if it is not there; each file appears when it is complete.

        **Raises:** `ValueError` if `folder` holds files of a tokenizer already, with which these would be mixed up, or
        cannot be written.
        """
        folder = make_folder(folder)
        self._expect_none_in(folder)
        restore(folder / "tokenizer")
        with hidden_beside(folder / "tokenizer", folder) as partial:
            more = self.write_vocabulary(partial)
            vocabulary = list(partial.iterdir())
            write_settings(
                partial,
                bos=None if self.bos_id is None else (self.bos_id, self.token_name(self.bos_id)),
                eos=[(id, self.token_name(id)) for id in self.eos_ids],
                add_bos=self.adds_bos,
                chat_template=self.chat_template,
                template_tokens=self.template_tokens,
                **more,
            )
            with exclusive(folder), interrupts.held():
                # Another process may have come first.
                self._expect_none_in(folder)
                # A vocabulary without its settings would be another tokenizer, so it comes last.
                for file in sorted(partial.iterdir(), key=vocabulary.__contains__):
                    file.rename(folder / file.name)

    def _expect_none_in(self, folder: Path):
        names = (*FILES, GENERATION) if len(self.eos_ids) > 1 else FILES
        if there := sorted(file.name for name in names for file in folder.glob(name)):
            raise InputError(
                f"The folder {str(folder)!r} holds {there[0]!r} already; remove it, or give another folder.",
                file=folder,
            )


def encode_as_text(
    encode: Callable[[str, bool], list[int]], text: str, controls: Mapping[str, int], *, first: bool
) -> list[int]:
    """The ids of a text by an encoder that may take the name of a control token for the token.

    **Arguments:**

    - `encode`: gets a text, and whether it comes first.
    - `controls`: the names. Where the encoder finds one, the text is cut after the name's first character, and the
        parts are encoded by themselves; a name of a single character stays what it is.
    """
    ids = encode(text, first)
    found = controls.items() if (present := set(ids)) else ()
    places = [
        f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name, id in found if id in present and len(name) > 1
    ]
    if not places:
        return ids
    return [id for at, part in enumerate(re.split("|".join(places), text)) for id in encode(part, first and at == 0)]


def control_pattern(groups: Sequence[tuple[str, Iterable[str], str]]) -> re.Pattern[str]:
    """Finds the longest control token at a place.

    **Arguments:**

    - `groups`: for each a regular expression that comes before its tokens, the tokens, and one that comes after.

    **Returns:** an expression with one group for each that has tokens.
    """
    branches = []
    for before, tokens, after in groups:
        names = sorted(tokens, key=len, reverse=True)
        if names:
            branches.append(f"{before}({'|'.join(map(re.escape, names))}){after}")
    return re.compile("|".join(branches) or r"(?!)")
