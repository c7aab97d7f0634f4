"""The interface of all tokenizers."""

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

    - `name`: the file of the tokenizer, for error messages.
    - `vocab`: number of token ids, from 0 to `vocab - 1`.
    - `bos_id`, `eos_ids`: the beginning-of-sequence token, if any, and the end-of-sequence tokens.
    - `adds_bos`: whether `encode` adds `bos_id` by default.
    - `chat_template`: the jinja2 template for conversations, if any.
    - `tool_template`: the template for conversations with tools, if it is another one.
    - `control_tokens`: the id of each control token by its name. A control token has a meaning for the model and is not
        text. An end-of-sequence token is a control token whatever its type in the file, unless it is ordinary text,
        such as a line break.
    - `control_pattern`: a pattern for control tokens in a text; the matching group is the name of the token.
    - `release_file`: the tokenizer file of a Mistral release, if any, which defines the chat format.
    """

    name: str
    vocab: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: str | None
    tool_template: str | None = None
    control_tokens: Mapping[str, int]
    control_pattern: re.Pattern[str]
    release_file: Path | None

    @abc.abstractmethod
    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        """The ids of a text without control tokens.

        **Arguments:**

        - `text`: the text, which may be empty.
        - `first`: whether the text is at the beginning of the input; `False` after a control token.

        **Returns:** the ids, without the beginning-of-sequence token.
        """

    @abc.abstractmethod
    def token_bytes(self, id: int, *, first: bool) -> bytes:
        """The UTF-8 bytes of a token, which may be a part of a character.

        **Arguments:**

        - `id`: the token, from 0 to `vocab - 1`.
        - `first`: whether the token is the first of a text. sentencepiece then removes the space that encoding adds.

        **Returns:** the bytes; for a control token, the bytes of its name.
        """

    @abc.abstractmethod
    def write_vocabulary(self, folder: Path) -> Mapping[str, Any]:
        """Writes the vocabulary file, for [`mistral_eqx.text.AbstractTokenizer.save`][].

        **Arguments:**

        - `folder`: an empty folder.

        **Returns:** more keys for `tokenizer_config.json`, such as the `tokenizer_class` for transformers.
        """

    def vocabulary_metadata(self) -> dict[str, Any]:
        """The keys of a GGUF file that hold the vocabulary, without those that `gguf_metadata` adds.

        **Raises:** `InputError` if this kind of vocabulary is not written to GGUF files.
        """
        raise InputError(
            f"{self.name} is a {type(self).__name__}, which is not written to GGUF files; use a tokenizer with "
            "byte-level BPE, or a tokenizer.model.",
            file=self.name,
        )

    def gguf_metadata(self) -> dict[str, Any]:
        """The keys of a GGUF file that hold the tokenizer, chat template and all.

        **Raises:** `InputError` if this kind of vocabulary is not written to GGUF files.
        """
        found = self.vocabulary_metadata()
        ids = {"bos": self.bos_id, "eos": next(iter(self.eos_ids), None)}
        found |= {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
        found["tokenizer.ggml.add_bos_token"] = self.adds_bos
        if self.chat_template is not None:
            found["tokenizer.chat_template"] = self.chat_template
        if self.tool_template is not None:
            found |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": self.tool_template}
        return found

    @functools.cached_property
    def template_tokens(self) -> Mapping[str, str]:
        """The text of each token that a chat template can use as a variable, such as `bos_token`.

        By default these are the beginning-of-sequence and end-of-sequence tokens; the tokenizer's files may name more.
        """
        named = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        return {name: self.token_name(id) for name, id in named.items() if id is not None}

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that are never text: all control tokens and end-of-sequence tokens."""
        return self._special_ids

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.control_tokens.values()) | frozenset(self.eos_ids)

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Turns text into token ids.

        **Arguments:**

        - `text`: any text, also an empty one.
        - `add_bos`: whether to start with `bos_id`; by default as the tokenizer's file says.
        - `parse_special`: whether the name of a control token in `text`, such as `<|im_start|>`, becomes that token.
            By default it is encoded as plain text, so that a user's text cannot imitate a template's control tokens.

        **Returns:** the ids.

        **Raises:** `ValueError` if `text` has half a surrogate pair, or if `add_bos` is set and there is no `bos_id`.
        """
        add_bos = self.adds_bos if add_bos is None else add_bos
        if add_bos and self.bos_id is None:
            raise InputError(f"{self.name} has no beginning-of-sequence token; leave out add_bos=True.")
        ids = self.encode_segments(self.segments(text) if parse_special else [text])
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def segments(self, text: str) -> list[str | int]:
        """Splits `text` at the names of control tokens, into plain texts and the ids of these tokens."""
        segments, end = [], 0
        for match in self.control_pattern.finditer(text):
            segments += [text[end : match.start()], self.control_tokens[match[match.lastindex or 0]]]
            end = match.end()
        return [*segments, text[end:]]

    def encode_segments(self, segments: Iterable[str | int]) -> list[int]:
        """Encodes segments: plain texts, and ids of control tokens."""
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
                        f"The text has half a surrogate pair at position {error.start}, which is not a character; "
                        "read the text with the right encoding."
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
        - `skip_special`: whether to omit control tokens; otherwise their names appear in the text.
        - `after`: the ids before `ids`, such as a prompt. A continuation keeps the space before its first word. At the
            beginning of a text or after a control token, decoding removes this space if encoding adds it.

        **Returns:** the text. Invalid UTF-8 becomes U+FFFD. Ids beyond the vocabulary, which exist because many models
        pad their embedding, are omitted.

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
        """Whether the next token begins a text, so that decoding removes the space that encoding adds.

        **Arguments:**

        - `after`: all ids before the next token, or only the last one.
        - `skip_special`: whether control tokens are omitted from the text.
        """
        return len(after) == 0 or (skip_special and operator.index(after[-1]) in self.special_ids)

    def token_name(self, id: int) -> str:
        """The text of a single token, or the name of a control token; `""` for an id beyond the vocabulary."""
        return self.token_bytes(id, first=False).decode(errors="replace") if id < self.vocab else ""

    def checked_id(self, id: SupportsIndex) -> int:
        """Converts an id to an int.

        **Raises:** `ValueError` if it is negative.
        """
        id = operator.index(id)
        if id < 0:
            raise InputError(
                f"The token id {id} is outside the vocabulary of {self.vocab} of {self.name}; leave out padding, and "
                "the -1 after the end of a row.",
                key="ids",
            )
        return id

    def find_stops(self, stop: str | Sequence[str], after: Sequence[Ids]) -> StopRows:
        """Makes an object that finds stop strings in the rows of a batch during generation.

        **Arguments:**

        - `stop`: one string or several.
        - `after`: for each row, the ids before the new tokens.

        **Raises:** `ValueError` if a stop string is empty.
        """
        return StopRows(self, stop, after)

    def save(self, folder: str | os.PathLike[str]):
        """Writes the tokenizer to files that [`mistral_eqx.text.load_tokenizer`][] can load.

        The files have the format of Hugging Face: the vocabulary as `tokenizer.json`, `tokenizer.model` or
        `tekken.json`, and `tokenizer_config.json` with the special tokens and the chat template. If there are several
        end-of-sequence tokens, `generation_config.json` lists them.

        **Arguments:**

        - `folder`: the folder of a model, or another folder. It is made if it does not exist. Each file appears when it
            is complete.

        **Raises:** `ValueError` if `folder` already holds files of a tokenizer, or cannot be written.
        """
        folder = make_folder(folder)
        self._check_no_tokenizer_in(folder)
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
                tool_template=self.tool_template,
                template_tokens=self.template_tokens,
                **more,
            )
            with exclusive(folder), interrupts.held():
                # Another process may have written a tokenizer since the first check.
                self._check_no_tokenizer_in(folder)
                # A vocabulary without its settings would be another tokenizer, so it is renamed last.
                for file in sorted(partial.iterdir(), key=vocabulary.__contains__):
                    file.rename(folder / file.name)

    def _check_no_tokenizer_in(self, folder: Path):
        names = (*FILES, GENERATION) if len(self.eos_ids) > 1 else FILES
        if there := sorted(file.name for name in names for file in folder.glob(name)):
            raise InputError(
                f"The folder {str(folder)!r} already holds {there[0]!r}; remove it, or give another folder.",
                file=folder,
            )


def encode_as_text(
    encode: Callable[[str, bool], list[int]], text: str, controls: Mapping[str, int], *, first: bool
) -> list[int]:
    """Encodes plain text with an encoder that may turn the name of a control token into the token.

    **Arguments:**

    - `encode`: the encoder, a function of a text and of whether the text is at the beginning of the input.
    - `controls`: the ids of control tokens by name. If the encoder finds a name, the text is split after the first
        character of the name, and both sides are encoded separately. A name of one character is not split.
    """
    ids = encode(text, first)
    found = controls.items() if (present := set(ids)) else ()
    splits = [
        f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name, id in found if id in present and len(name) > 1
    ]
    if not splits:
        return ids
    return [id for at, part in enumerate(re.split("|".join(splits), text)) for id in encode(part, first and at == 0)]


def control_pattern(groups: Sequence[tuple[str, Iterable[str], str]]) -> re.Pattern[str]:
    """Makes a pattern that finds the longest control token at a position.

    **Arguments:**

    - `groups`: for each group, a regular expression before its tokens, the tokens, and a regular expression after them.

    **Returns:** a pattern with one regular-expression group for each group that has tokens.
    """
    branches = []
    for before, tokens, after in groups:
        names = sorted(tokens, key=len, reverse=True)
        if names:
            branches.append(f"{before}({'|'.join(map(re.escape, names))}){after}")
    return re.compile("|".join(branches) or r"(?!)")
