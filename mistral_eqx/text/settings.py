"""Reads and writes the settings files of a tokenizer: special tokens and the chat template."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..documents import MiB, read_json, read_text, shown
from ..errors import InputError


# Name patterns of all files of a tokenizer.
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
    "additional_chat_templates/tool_use.jinja",
)
# A file of the model, which lists all end-of-sequence ids.
GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a tokenizer; `None` or empty where the files have no value.

    **Attributes:**

    - `bos_token`, `eos_token`: the text of the beginning-of-sequence and end-of-sequence tokens.
    - `bos_id`, `eos_ids`: their ids in the model's configuration. `bos_id` is `None` if the tokenizer's files say that
        there is no beginning-of-sequence token.
    - `add_bos`: whether encoding adds the beginning-of-sequence token.
    - `chat_template`: the jinja2 template for conversations.
    - `tool_template`: the template named `tool_use`, for conversations with tools.
    - `template_tokens`: the text of the tokens that the template can use as variables, such as `pad_token`; `None` if
        the tokenizer's files do not give them.
    - `added_tokens`: the tokens that were added to the vocabulary, with their ids.
    - `special_tokens`: the text of the tokens that have a named purpose, or are listed or marked as special.
    """

    bos_token: str | None
    eos_token: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool | None
    chat_template: str | None
    tool_template: str | None
    template_tokens: Mapping[str, str] | None
    added_tokens: Mapping[str, int]
    special_tokens: frozenset[str]


# The named tokens of every tokenizer of transformers.
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTED = ("extra_special_tokens", "additional_special_tokens")
# The defaults of these classes of transformers.
_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_WITH_DEFAULTS = ("LlamaTokenizer", "LlamaTokenizerFast")

Value = TypeVar("Value")


def read_settings(folder: Path) -> Settings:
    """Reads the settings files of a tokenizer that a folder has, such as `tokenizer_config.json`.

    **Raises:** `ValueError` that names the file and the key, if a file is damaged or a value has the wrong type.
    """
    tokenizer = _Object(folder / "tokenizer_config.json")
    special = _Object(folder / "special_tokens_map.json")
    more = _Object(folder / "added_tokens.json")
    # The model's configuration lists all end-of-sequence ids; the tokenizer's has only one.
    model, generation = _Object(folder / "config.json"), _Object(folder / GENERATION)
    bos_id, eos_ids = (
        (generation if key in generation.content else model).ids(key) for key in ("bos_token_id", "eos_token_id")
    )
    decoder = tokenizer.decoder()
    # As in transformers, the older file is used only if the newer one does not list the tokens.
    older = {} if "added_tokens_decoder" in tokenizer.content else special.named()
    tokens = older | tokenizer.named()
    if tokens.get("bos_token", "") is None:
        bos_id = ()
    listed = [text for file in (special, tokenizer) for text in [*file.listed(), *file.named().values()]]
    marked = [text for text, _, is_special in decoder if is_special]
    defaults = _DEFAULTS if tokenizer.content.get("tokenizer_class") in _WITH_DEFAULTS else {}
    templates = _chat_templates(folder, tokenizer)
    known = bool(tokens) or "tokenizer_class" in tokenizer.content
    return Settings(
        bos_token=tokens.get("bos_token"),
        eos_token=tokens.get("eos_token"),
        bos_id=bos_id[0] if bos_id else None,
        eos_ids=eos_ids,
        add_bos=tokenizer.get("add_bos_token", bool, "true or false"),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
        template_tokens={name: text for name, text in {**defaults, **tokens}.items() if text} if known else None,
        added_tokens={text: id for text, id, _ in decoder} | more.ids_of_tokens(),
        special_tokens=frozenset(text for text in [*listed, *marked] if text),
    )


class _Object:
    """The JSON object of a settings file, with typed access to its keys.

    **Attributes:**

    - `content`: its keys and values; empty if the file does not exist.
    """

    def __init__(self, path: Path):
        self._path = path
        self.content: dict[str, Any] = _read_optional(path, read_json) or {}

    def get(self, key: str, kind: type[Value], wanted: str) -> Value | None:
        """The value of a key, checked against a type; `None` if it is null or absent."""
        value = self.content.get(key)
        if value is not None and type(value) is not kind:
            raise self.wrong(key, value, wanted)
        return value

    def wrong(self, key: str, value: Any, wanted: str) -> InputError:
        """The error about a value of the wrong type."""
        return InputError(
            f"{str(self._path)!r} has {shown(key)}: {shown(value)}, which must be {wanted}; correct the settings there"
            " or fetch the file again.",
            file=self._path,
            key=key,
        )

    def ids(self, key: str) -> tuple[int, ...]:
        """The id of a key; `eos_token_id` may have several."""
        value: Any = self.content.get(key)
        ids: list[Any] = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if value is None:
            return ()
        if not all(_is_id(id) for id in ids):
            raise self.wrong(key, value, "a token id" + " or a list of them" * (key == "eos_token_id"))
        return tuple(ids)

    def ids_of_tokens(self) -> dict[str, int]:
        """The whole object as ids by token."""
        for text, id in self.content.items():
            if not text or not _is_id(id):
                raise self.wrong(text, id, "a token id")
        return self.content

    def decoder(self) -> list[tuple[str, int, bool]]:
        """The text and id of each added token, and whether it is special."""
        key, wanted = "added_tokens_decoder", "an object of tokens by their ids"
        found = self.get(key, dict, wanted) or {}
        tokens: list[tuple[str, int, bool]] = []
        for id, token in found.items():
            if not (id.isascii() and id.isdigit() and len(id) < 11 and _is_id(int(id)) and isinstance(token, dict)):
                raise self.wrong(key, found, wanted)
            tokens.append((self._text(f"{key}.{id}", token), int(id), token.get("special", False)))
        return tokens

    def named(self) -> dict[str, str | None]:
        """The named tokens by key; `None` for a key with the value null."""
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
        """The special tokens without a name."""
        tokens: list[str] = []
        for key in _LISTED:
            found = self.content.get(key)
            if not isinstance(found, list | dict | None):
                raise self.wrong(key, found, "a list of tokens")
            if isinstance(found, list):
                tokens += [self._text(key, token) for token in found]
        return tokens

    def _text(self, key: str, token: Any) -> str:
        """The text of a token that is given as text or as an object."""
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


def _read_optional(path: Path, read: Callable[[Path], Value]) -> Value | None:
    """Reads a file; `None` if it does not exist.

    **Raises:** `ValueError` if the file exists and cannot be read.
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
    tool_template: str | None,
    template_tokens: Mapping[str, str],
    **more: Any,
):
    """Writes `tokenizer_config.json`, and `generation_config.json` if there are several end-of-sequence tokens.

    **Arguments:**

    - `folder`: the folder to write into.
    - `bos`, `eos`: id and text of the beginning-of-sequence token, and of each end-of-sequence token.
    - `add_bos`, `chat_template`, `tool_template`, `template_tokens`: as in `Settings`.
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
    if tool_template is not None:
        templates = {"default": chat_template, "tool_use": tool_template}
        configuration["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items() if template is not None
        ]
    elif chat_template is not None:
        configuration["chat_template"] = chat_template
    _write_json(folder / "tokenizer_config.json", configuration)
    if len(eos) > 1:
        ids = {"bos_token_id": None if bos is None else bos[0], "eos_token_id": [id for id, _ in eos]}
        _write_json(folder / GENERATION, ids)


def _write_json(path: Path, content: dict[str, Any]):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _chat_templates(folder: Path, tokenizer: _Object) -> Mapping[str, str]:
    """The templates for conversations by name: `default`, and others such as `tool_use`. Files have precedence."""
    names = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
    files = {name: _read_optional(folder / file, lambda path: read_text(path, MiB)) for name, file in names.items()}
    if files["default"] is not None:
        return {name: template for name, template in files.items() if template is not None}
    file = tokenizer if tokenizer.content.get("chat_template") is not None else _Object(folder / "chat_template.json")
    configured = file.content.get("chat_template")
    named = {"default": configured} if isinstance(configured, str) else {} if configured is None else configured
    if isinstance(named, list) and all(isinstance(e, dict) and isinstance(e.get("name"), str) for e in named):
        named = {entry["name"]: entry.get("template") for entry in named}
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        wanted = "a jinja2 template, or a list of objects with 'name' and 'template'"
        raise file.wrong("chat_template", configured, wanted)
    return named
