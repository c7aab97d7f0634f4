"""What the small JSON files beside a vocabulary say about it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    - `bos_id`, `eos_ids`: the ids that the model's own configuration gives for them.
    - `add_bos`: whether a text starts with the token that starts a text.
    - `chat_template`: the jinja2 template for conversations.
    - `added_tokens`: tokens that were added to the vocabulary, with their ids.
    - `special_tokens`: the text of those that are control tokens.
    """

    bos_token: str | None
    eos_token: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool | None
    chat_template: str | None
    added_tokens: Mapping[str, int]
    special_tokens: frozenset[str]


def read_settings(folder: Path) -> Settings:
    """Reads `tokenizer_config.json` and its like, as far as they are there.

    **Raises:** `ValueError` if one of them is damaged.
    """
    try:
        return _settings(folder)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"The settings of the tokenizer in {folder} are not of the form that Hugging Face's tokenizer_config.json "
            f"and config.json have ({type(error).__name__}: {error}); fetch them again."
        ) from error


def _settings(folder: Path) -> Settings:
    tokenizer = read_json(folder / "tokenizer_config.json")
    special = read_json(folder / "special_tokens_map.json")
    # The model's configuration lists all ids that end a text where the tokenizer's names one.
    model = {**read_json(folder / "config.json"), **read_json(folder / GENERATION)}
    eos_ids = model.get("eos_token_id")
    added = {_text(token): int(id) for id, token in tokenizer.get("added_tokens_decoder", {}).items()}
    return Settings(
        bos_token=_text(tokenizer.get("bos_token", special.get("bos_token"))),
        eos_token=_text(tokenizer.get("eos_token", special.get("eos_token"))),
        bos_id=model.get("bos_token_id"),
        eos_ids=() if eos_ids is None else tuple(eos_ids) if isinstance(eos_ids, list) else (eos_ids,),
        add_bos=tokenizer.get("add_bos_token"),
        chat_template=_chat_template(folder, tokenizer.get("chat_template")),
        added_tokens={text: id for text, id in added.items() if text is not None}
        | read_json(folder / "added_tokens.json"),
        special_tokens=_special(special) | _special(tokenizer),
    )


def _special(settings: Mapping[str, Any]) -> frozenset[str]:
    """The tokens that settings name for a purpose, list as special or mark as such."""
    named = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key) or ()
        named += listed.values() if isinstance(listed, dict) else listed
    marked = settings.get("added_tokens_decoder", {}).values()
    named += [token for token in marked if isinstance(token, dict) and token.get("special") is True]
    return frozenset(text for token in named if isinstance(text := _text(token), str) and text)


def write_settings(
    folder: Path,
    *,
    bos: tuple[int, str] | None,
    eos: Sequence[tuple[int, str]],
    add_bos: bool,
    chat_template: str | None,
    **more: Any,
):
    """Writes `tokenizer_config.json`, and `generation_config.json` if several tokens end a text.

    **Arguments:**

    - `folder`: where.
    - `bos`, `eos`: id and text of the token that starts a text, and of those that end one.
    - `add_bos`, `chat_template`: as in `Settings`.
    - `more`: other keys of `tokenizer_config.json`.
    """
    configuration = {
        **more,
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


def _chat_template(folder: Path, configured: Any) -> str | None:
    """The template for a conversation without tools; a file of its own wins."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8; a chat template is plain text.") from error
    if configured is None:
        configured = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(configured, list):
        return {entry["name"]: entry["template"] for entry in configured}.get("default")
    return configured


def _text(token: Any) -> str | None:
    """The text of a token that is written as such or with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, an empty one if there is no such file.

    **Raises:** `ValueError` if it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(content).__name__}; fetch it again.")
    return content
