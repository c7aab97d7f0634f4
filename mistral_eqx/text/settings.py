"""What the small JSON files beside a vocabulary say about it."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..documents import MiB, read_json, read_text, shown
from ..errors import InputError


# All files, as patterns of their names, by which a folder says what its tokenizer is.
FILES = (
    "tokenizer.json",
    "tekken.json",
    "*.model",
    "*.model.v[0-9]*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# The model's, which lists all ids that end a text.
GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is said of the tokens and of conversations; `None` or nothing where nothing is said.

    **Attributes:**

    - `bos_token`, `eos_token`: the text of the tokens that start and end a text.
    - `bos_id`, `eos_ids`: the ids that the model's own configuration gives for them. There is no `bos_id` where the
        tokenizer's files say that nothing starts a text.
    - `add_bos`: whether a text starts with the token that starts a text.
    - `chat_template`: the jinja2 template for conversations.
    - `template_tokens`: the variables of the template that stand for tokens, such as `pad_token`, with their text;
        `None` if the tokenizer's files do not say it.
    - `added_tokens`: tokens that were added to the vocabulary, with their ids.
    - `special_tokens`: the text of the tokens that are named for a purpose, listed as special or marked as such.
    """

    bos_token: str | None
    eos_token: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool | None
    chat_template: str | None
    template_tokens: Mapping[str, str] | None
    added_tokens: Mapping[str, int]
    special_tokens: frozenset[str]


# The tokens that have a purpose in every tokenizer of transformers.
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTED = ("extra_special_tokens", "additional_special_tokens")
# What transformers' class takes unless the settings say otherwise.
_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_WITH_DEFAULTS = ("LlamaTokenizer", "LlamaTokenizerFast")

Value = TypeVar("Value")


def read_settings(folder: Path) -> Settings:
    """Reads `tokenizer_config.json` and its like, as far as they are there.

    **Raises:** `ValueError` that names the file and the key, if one of them is damaged or of a wrong type.
    """
    tokenizer = _Object(folder / "tokenizer_config.json")
    special = _Object(folder / "special_tokens_map.json")
    more = _Object(folder / "added_tokens.json")
    # The model's configuration lists all ids that end a text where the tokenizer's names one.
    model, generation = _Object(folder / "config.json"), _Object(folder / GENERATION)
    bos_id, eos_ids = (
        (generation if key in generation.content else model).ids(key) for key in ("bos_token_id", "eos_token_id")
    )
    decoder = tokenizer.decoder()
    # As transformers does: the older file counts where the newer one does not list the tokens itself.
    older = {} if "added_tokens_decoder" in tokenizer.content else special.named()
    tokens = older | tokenizer.named()
    if tokens.get("bos_token", "") is None:
        bos_id = ()
    listed = [text for file in (special, tokenizer) for text in [*file.listed(), *file.named().values()]]
    marked = [text for text, _, is_special in decoder if is_special]
    defaults = _DEFAULTS if tokenizer.content.get("tokenizer_class") in _WITH_DEFAULTS else {}
    known = bool(tokens) or "tokenizer_class" in tokenizer.content
    return Settings(
        bos_token=tokens.get("bos_token"),
        eos_token=tokens.get("eos_token"),
        bos_id=bos_id[0] if bos_id else None,
        eos_ids=eos_ids,
        add_bos=tokenizer.get("add_bos_token", bool, "true or false"),
        chat_template=_chat_template(folder, tokenizer),
        template_tokens={name: text for name, text in {**defaults, **tokens}.items() if text} if known else None,
        added_tokens={text: id for text, id, _ in decoder} | more.ids_of_tokens(),
        special_tokens=frozenset(text for text in [*listed, *marked] if text),
    )


class _Object:
    """A JSON object whose keys are checked as they are read.

    **Attributes:**

    - `content`: its keys; none if there is no such file.
    """

    def __init__(self, path: Path):
        self._path = path
        self.content: dict[str, Any] = _if_there(path, read_json) or {}

    def get(self, key: str, kind: type[Value], wanted: str) -> Value | None:
        """A value of a type, or `None` if it is null or not there."""
        value = self.content.get(key)
        if value is not None and type(value) is not kind:
            raise self.wrong(key, value, wanted)
        return value

    def wrong(self, key: str, value: Any, wanted: str) -> InputError:
        """The error for a key whose value cannot be used."""
        return InputError(
            f"{str(self._path)!r} says {shown(key)}: {shown(value)}, which must be {wanted}; correct the settings there"
            " or fetch the file again.",
            file=self._path,
            key=key,
        )

    def ids(self, key: str) -> tuple[int, ...]:
        """One id; of the tokens that end a text there may be several."""
        value: Any = self.content.get(key)
        ids: list[Any] = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if value is None:
            return ()
        if not all(_is_id(id) for id in ids):
            raise self.wrong(key, value, "a token id" + " or a list of them" * (key == "eos_token_id"))
        return tuple(ids)

    def ids_of_tokens(self) -> dict[str, int]:
        """All keys, as tokens with their ids."""
        for text, id in self.content.items():
            if not text or not _is_id(id):
                raise self.wrong(text, id, "a token id")
        return self.content

    def decoder(self) -> list[tuple[str, int, bool]]:
        """Text and id of the tokens that were added, and whether each is special."""
        key, wanted = "added_tokens_decoder", "an object of tokens by their ids"
        found = self.get(key, dict, wanted) or {}
        tokens: list[tuple[str, int, bool]] = []
        for id, token in found.items():
            if not (id.isascii() and id.isdigit() and len(id) < 11 and _is_id(int(id)) and isinstance(token, dict)):
                raise self.wrong(key, found, wanted)
            tokens.append((self._text(f"{key}.{id}", token), int(id), token.get("special", False)))
        return tokens

    def named(self) -> dict[str, str | None]:
        """The tokens that a key names; `None` where the key says that there is none."""
        tokens = {key: value if value is None else self._text(key, value) for key, value in self._tokens()}
        for key in _LISTED:
            if isinstance(found := self.content.get(key), dict):
                tokens |= {name: self._text(f"{key}.{name}", token) for name, token in found.items()}
        return tokens

    def _tokens(self) -> Iterator[tuple[str, Any]]:
        for key, value in self.content.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key in _NAMED or (key.endswith("_token") and isinstance(text, str)):
                yield key, value

    def listed(self) -> list[str]:
        """The tokens that are special and have no name."""
        tokens: list[str] = []
        for key in _LISTED:
            found = self.content.get(key)
            if not isinstance(found, list | dict | None):
                raise self.wrong(key, found, "a list of tokens")
            if isinstance(found, list):
                tokens += [self._text(key, token) for token in found]
        return tokens

    def _text(self, key: str, token: Any) -> str:
        """The text of a token that is written as such or with its properties."""
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str):
            raise self.wrong(key, token, "a token, which is text or an object with 'content'")
        if isinstance(token, dict):
            for flag in ("special", "lstrip", "rstrip", "single_word", "normalized"):
                if not isinstance(token.get(flag, False), bool):
                    raise self.wrong(f"{key}.{flag}", token[flag], "true or false")
        return text


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _if_there(path: Path, read: Callable[[Path], Value]) -> Value | None:
    """What a file holds that need not be there.

    **Raises:** `ValueError` if it is there and cannot be read.
    """
    if not os.path.lexists(path):
        return None
    try:
        return read(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        remedy = "fetch it again, or remove it"
        raise InputError(f"{str(path)!r} cannot be read ({reason})", file=path, remedy=remedy) from error


def write_settings(
    folder: Path,
    *,
    bos: tuple[int, str] | None,
    eos: Sequence[tuple[int, str]],
    add_bos: bool,
    chat_template: str | None,
    template_tokens: Mapping[str, str],
    **more: Any,
):
    """Writes `tokenizer_config.json`, and `generation_config.json` if several tokens end a text.

    **Arguments:**

    - `folder`: where.
    - `bos`, `eos`: id and text of the token that starts a text, and of those that end one.
    - `add_bos`, `chat_template`, `template_tokens`: as in `Settings`.
    - `more`: other keys of `tokenizer_config.json`.
    """
    others = {name: text for name, text in template_tokens.items() if name not in ("bos_token", "eos_token")}
    extra = {name: text for name, text in others.items() if name not in _NAMED}
    configuration = {
        **more,
        **{name: text for name, text in others.items() if name in _NAMED},
        **({"extra_special_tokens": extra} if extra else {}),
        "bos_token": None if bos is None else bos[1],
        "eos_token": eos[0][1] if eos else None,
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        configuration["chat_template"] = chat_template
    _write_json(folder / "tokenizer_config.json", configuration)
    if len(eos) > 1:
        ids = {"bos_token_id": None if bos is None else bos[0], "eos_token_id": [id for id, _ in eos]}
        _write_json(folder / GENERATION, ids)


def _write_json(path: Path, content: dict[str, Any]):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _chat_template(folder: Path, tokenizer: _Object) -> str | None:
    """The template for a conversation without tools; a file of its own wins."""
    template = _if_there(folder / "chat_template.jinja", lambda path: read_text(path, MiB))
    if template is not None:
        return template
    file = tokenizer if tokenizer.content.get("chat_template") is not None else _Object(folder / "chat_template.json")
    configured = file.content.get("chat_template")
    named = configured
    if isinstance(configured, list) and all(isinstance(entry, dict) for entry in configured):
        names = [entry.get("name") for entry in configured]
        if all(isinstance(name, str) for name in names):
            named = {entry["name"]: entry.get("template") for entry in configured}
    if isinstance(named, dict) and all(isinstance(text, str) for text in named.values()):
        return named.get("default")
    if not isinstance(named, str | None):
        wanted = "a jinja2 template, or a list of objects with 'name' and 'template'"
        raise file.wrong("chat_template", configured, wanted)
    return named
