"""Vocabularies that the `tokenizers` library runs."""

import base64
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors

from ..documents import read_json, read_text, shown
from ..errors import InputError
from .gguf_metadata import byte_level_metadata
from .libraries import LARGEST, as_input_error
from .settings import Settings, read_settings
from .tokenizer import AbstractTokenizer, control_pattern, encode_as_text


_SPACE = "\u2581"
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_level() -> dict[str, int]:
    """The byte of each printable character of byte-level BPE."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


# The byte of each character of a byte-level vocabulary.
BYTES = _byte_level()

# Adds a leading space to a text without leading white space, in two steps: the library cannot match an empty string.
SPACE_PREFIX = [normalizers.Prepend(" "), normalizers.Replace(Regex(r"\A (?=\s)"), "")]
_PREFIX_STEPS = [json.loads(step.__getstate__()) for step in SPACE_PREFIX]


@final
class HuggingFaceTokenizer(AbstractTokenizer):
    """A tokenizer of the `tokenizers` library, from a `tokenizer.json` or a GGUF file."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        name: str,
        bos_id: int | None,
        eos_ids: Iterable[int],
        adds_bos: bool,
        chat_template: str | None = None,
        tool_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
    ):
        """**Arguments:**

        - `tokenizer`: the tokenizer. It is modified, to encode the names of control tokens as plain text.
        - `name`: its file, for error messages.
        - `bos_id`, `eos_ids`, `adds_bos`, `chat_template`, `tool_template`, `template_tokens`: as in
            `AbstractTokenizer`.

        **Raises:** `ValueError` if its decoder cannot decode token by token.
        """
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.name = name
        self._tokenizer = tokenizer
        self._byte_level, self._strips = _decoding(tokenizer, name)
        self._added = tokenizer.get_added_tokens_decoder()
        # The ids of a vocabulary may have gaps.
        self.vocab = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.adds_bos = adds_bos
        self.chat_template = chat_template
        self.tool_template = tool_template
        if template_tokens is not None:
            self.template_tokens = template_tokens
        # An end-of-sequence token is a control token whatever its type, unless texts encode to it.
        eos = {id: text for id in self.eos_ids if (text := self.token_name(id))}
        with as_input_error(name, f"{name} cannot encode the name of its end-of-sequence token"):
            not_in_text = [id for id, text in eos.items() if id in self._added or id not in _encode(tokenizer, text)]
        mark_special(tokenizer, [eos[id] for id in not_in_text if tokenizer.token_to_id(eos[id]) == id])
        self._added = tokenizer.get_added_tokens_decoder()
        self._tokenizer_without_prefix = _without_prefix(tokenizer)
        self.control_tokens = {token.content: id for id, token in self._added.items() if token.special}
        self.control_pattern = _pattern(token for token in self._added.values() if token.special)
        self.release_file = None

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        def encode(part: str, first: bool) -> list[int]:
            with as_input_error(self.name, f"{self.name} cannot encode the text"):
                return _encode(self._tokenizer if first else self._tokenizer_without_prefix, part)

        # A unigram model has control tokens among its words, and so finds them in plain text.
        return encode_as_text(encode, text, self.control_tokens, first=first)

    def token_bytes(self, id: int, *, first: bool) -> bytes:
        if id in self._added:
            return self._added[id].content.encode()
        token = self._tokenizer.id_to_token(id) or ""
        if self._byte_level:
            return bytes(BYTES[c] for c in token) if all(c in BYTES for c in token) else token.encode()
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        if first and self._strips:
            token = token.removeprefix(_SPACE)
        return token.replace(_SPACE, " ").encode()

    def vocabulary_metadata(self) -> dict[str, Any]:
        if not self._byte_level:
            return super().vocabulary_metadata()
        plain = self._tokenizer_without_prefix
        return byte_level_metadata(plain, self.vocab, self.name, space_prefix=plain is not self._tokenizer)

    def write_vocabulary(self, folder: Path) -> Mapping[str, Any]:
        start = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
        if _start_ids(self._tokenizer) != start:
            # Other programs read the beginning-of-sequence token from here; this package never runs it.
            tokens = [self._tokenizer.id_to_token(id) for id in start]
            self._tokenizer.post_processor = processors.TemplateProcessing(
                single=[*tokens, "$A"],
                pair=[*tokens, "$A", *(f"{token}:1" for token in tokens), "$B:1"],
                special_tokens=list(zip(tokens, start, strict=True)),
            )
        self._tokenizer.save(str(folder / "tokenizer.json"))
        return {"tokenizer_class": "PreTrainedTokenizerFast"}


def _pattern(tokens: Iterable[AddedToken]):
    """A pattern for control tokens, with the white space that some of them strip."""
    kinds: dict[tuple[bool, bool, bool], list[str]] = {}
    for token in tokens:
        kinds.setdefault((token.lstrip, token.rstrip, token.single_word), []).append(token.content)
    return control_pattern(
        [
            (
                (r"\s*" if lstrip else "") + (r"(?<!\w)" if word else ""),
                names,
                (r"(?!\w)" if word else "") + (r"\s*" if rstrip else ""),
            )
            for (lstrip, rstrip, word), names in kinds.items()
        ]
    )


def _without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer for text after a control token, where no leading space is added."""
    normalizer_steps = _steps(tokenizer.normalizer, "normalizers")
    pre_tokenizer_steps = _steps(tokenizer.pre_tokenizer, "pretokenizers")
    prefixed = all(step in normalizer_steps for step in _PREFIX_STEPS)
    kept = [step for step in normalizer_steps if not prefixed or step not in _PREFIX_STEPS]
    changed = [
        {**step, "prepend_scheme": "never"} if step.get("prepend_scheme") == "first" else step
        for step in pre_tokenizer_steps
    ]
    if kept == normalizer_steps and changed == pre_tokenizer_steps:
        return tokenizer
    content = json.loads(tokenizer.to_str())
    content["normalizer"] = {"type": "Sequence", "normalizers": kept}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": changed}
    later = Tokenizer.from_str(json.dumps(content))
    later.encode_special_tokens = True
    return later


def _decoding(tokenizer: Tokenizer, name: str) -> tuple[bool, bool]:
    """Whether tokens consist of byte-level characters, and whether the first token loses its leading space."""
    steps = _steps(tokenizer.decoder, "decoders")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds == ["Metaspace"] and steps[0]["replacement"] == _SPACE:
        return False, steps[0]["prepend_scheme"] != "never"
    known = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    if steps in (known, known[:3]):
        return False, len(steps) == 4
    raise InputError(
        f"The decoder {' + '.join(kinds) or 'null'} of {name} is not one that Mistral-like models use, so its tokens "
        "cannot be decoded one by one; use another tokenizer.json."
    )


def _steps(component: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a component of a tokenizer."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state[key] if state["type"] == "Sequence" else [state]


def read_tokenizer_json(path: Path) -> HuggingFaceTokenizer:
    """Reads a `tokenizer.json` and the settings files in its folder.

    **Raises:** `ValueError` if a file is damaged, or the tokens cannot be decoded one by one.
    """
    text = read_text(path, LARGEST)
    with as_input_error(path, f"{path} is not a tokenizer.json, or it is damaged"):
        _check_replacements(text)
        tokenizer = Tokenizer.from_str(text)
        _check_steps(tokenizer)
    _use_tekken_pattern(tokenizer, path.with_name("tekken.json"))
    settings = read_settings(path.parent)
    _add_tokens(tokenizer, settings, path)
    bos_id = settings.bos_id
    if settings.bos_token is not None:
        bos_id = _id(tokenizer, settings.bos_token, path)
    eos_ids = list(settings.eos_ids)
    if settings.eos_token is not None:
        eos_ids.insert(0, _id(tokenizer, settings.eos_token, path))
    add_bos = settings.add_bos
    if tokenizer.post_processor is not None:
        # As in transformers, the post-processor has precedence over the settings.
        with as_input_error(path, f"{path} has a post_processor that cannot be applied"):
            start = _start_ids(tokenizer)
        if any(tokenizer.id_to_token(id) is None for id in start):
            raise InputError(
                f"{path} adds the token ids {shown(start)} to the start of a text (post_processor), but its vocabulary "
                "does not have them; fetch it again.",
                file=path,
                key="post_processor",
            )
        add_bos = bool(start)
        bos_id = start[0] if start and bos_id not in start else bos_id
    return HuggingFaceTokenizer(
        tokenizer,
        name=str(path),
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=bool(add_bos) and bos_id is not None,
        chat_template=settings.chat_template,
        tool_template=settings.tool_template,
        template_tokens=settings.template_tokens,
    )


def _check_steps(tokenizer: Tokenizer):
    """Refuses steps on which the library would panic, and print a message.

    **Raises:** `ValueError`.
    """
    for step in _steps(tokenizer.normalizer, "normalizers"):
        if step.get("prepend") == "" or step.get("pattern") in ({"String": ""}, {"Regex": ""}):
            raise ValueError(f"its normalizer {step['type']} has an empty pattern or prefix")
    for step in _steps(tokenizer.post_processor, "processors"):
        pieces = [*step.get("single", ()), *step.get("pair", ())]
        named = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        if unknown := [token for token in named if token not in step.get("special_tokens", {})]:
            raise ValueError(f"its post_processor does not give the id of {shown(unknown[0])}")


def _check_replacements(content: str):
    """Refuses a table of character replacements that is shorter than its header says: the library would abort.

    **Raises:** `ValueError`.
    """
    # Few files have such a table, and parsing the JSON doubles the time, so other files are skipped.
    if "charsmap" not in content and not re.search(r"\\u00[67]", content):
        return
    normalizers = [json.loads(content).get("normalizer")]
    for step in normalizers:
        if not isinstance(step, dict):
            continue
        normalizers += step.get("normalizers") or []
        if step.get("type") == "Precompiled":
            table = base64.b64decode(step.get("precompiled_charsmap") or "")
            size = int.from_bytes(table[:4], "little")
            if len(table) < 4 or size > len(table) - 4 or size % 4:
                raise ValueError("its precompiled_charsmap is too short")


def _add_tokens(tokenizer: Tokenizer, settings: Settings, path: Path):
    """Adds the tokens that only the settings have, and marks the control tokens that only the settings name."""
    for token, id in sorted(settings.added_tokens.items(), key=lambda entry: entry[1]):
        found = tokenizer.token_to_id(token)
        if found is None and id == tokenizer.get_vocab_size(with_added_tokens=True):
            tokenizer.add_tokens([AddedToken(token, normalized=token not in settings.special_tokens)])
        elif found != id:
            raise InputError(
                f"The settings in {path.parent} give the token {shown(token)} the id {id}, and {path.name} does not; "
                "are both files of the same model?",
                file=path,
                key=token,
            )
    mark_special(tokenizer, [token for token in settings.special_tokens if tokenizer.token_to_id(token) is not None])


def mark_special(tokenizer: Tokenizer, names: Iterable[str]):
    """Turns tokens of the vocabulary into control tokens."""
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    special: list[AddedToken] = []
    for name in names:
        token = added.get(name) or AddedToken(name, normalized=False)
        if not token.special:
            token.special = True
            special.append(token)
    if special:
        tokenizer.add_special_tokens(special)


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer's post-processor adds to the start of a text."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    masked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [id for id, _ in itertools.takewhile(lambda entry: entry[1] == 1, masked)]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _use_tekken_pattern(tokenizer: Tokenizer, original: Path):
    """Uses the pattern of the `tekken.json` in the same folder, if there is one.

    Some of Mistral's folders hold a `tokenizer.json` that was converted with the pattern of another model.
    """
    if not original.is_file() or [step["type"] for step in _steps(tokenizer.decoder, "decoders")] != ["ByteLevel"]:
        return
    config = read_json(original, LARGEST).get("config", {})
    pattern = config.get("pattern") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(pattern, str | None):
        raise InputError(
            f"{original} must have a config with a pattern that is a regular expression, not {shown(config)}; fetch it "
            "again.",
            file=original,
            key="config",
        )
    if pattern is not None:
        with as_input_error(original, f"{original} has a pattern in its config that is not a regular expression"):
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
        to_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_characters])


def _id(tokenizer: Tokenizer, token: str, path: Path) -> int:
    id = tokenizer.token_to_id(token)
    if id is None:
        raise InputError(
            f"The settings in {path.parent} name the token {token!r}, which {path.name} does not have; "
            "are both files of the same model?"
        )
    return id
