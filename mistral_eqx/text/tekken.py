"""Mistral's tekken vocabularies."""

import base64
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from tokenizers import Regex, Tokenizer, models
from tokenizers.pre_tokenizers import Split

from ..documents import read_text, shown
from ..errors import InputError
from .gguf_metadata import byte_level_metadata
from .huggingface import BYTES
from .libraries import LARGEST, as_input_error
from .pre_tokenizers import PreTokenizer
from .sentencepiece_model import CONTROL
from .settings import read_settings
from .tokenizer import AbstractTokenizer, control_pattern


# If a pattern covers this text, it covers any text.
_PROBE = "A word, 12 \u00e9\u5929\n\t!"
# The control tokens of files that do not list them, which are of version 3 or 7.
_NAMES = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"),
    *("[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_WITHOUT_LIST = ("v3", "v7")


@final
class TekkenTokenizer(AbstractTokenizer):
    """A `tekken.json`: byte-level BPE with the control tokens first.

    The `tokenizers` library runs it, with merges that follow from the ranks. Its ids are those of mistral-common.
    """

    def __init__(self, path: Path):
        """**Arguments:**

        - `path`: a file with `tekken` in its name.

        **Raises:** `ValueError` if the file is damaged.
        """
        with as_input_error(path, f"{path} is not a tekken.json, or it is damaged"):
            content = json.loads(read_text(path, LARGEST))
            if complaint := _complaint(content):
                raise InputError(
                    f"{path} is not a tekken.json, or it is damaged ({complaint}); fetch it again.", file=path
                )
            config = content["config"]
            self._names = _names(content)
            self._words = _words(content)
            self._tokenizer = _byte_level(self._words, len(self._names), config["pattern"])
            matches = Split(Regex(config["pattern"]), "removed", invert=True).pre_tokenize_str(_PROBE)
            if "".join(word for word, _ in matches) != _PROBE:
                raise ValueError("its pattern does not cover all of a text")
        settings = read_settings(path.parent)
        self.name = str(path)
        self.vocab = config["default_vocab_size"]
        self.bos_id = self._names.index("<s>")
        self.eos_ids = tuple(dict.fromkeys([self._names.index("</s>"), *settings.eos_ids]))
        self.adds_bos = settings.add_bos is not False
        self.chat_template, self.tool_template = settings.chat_template, settings.tool_template
        if settings.template_tokens is not None:
            self.template_tokens = settings.template_tokens
        self.control_tokens = {name: id for id, name in enumerate(self._names)}
        self.control_pattern = control_pattern([("", self.control_tokens, "")])
        self.release_file = self._path = path

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        with as_input_error(self.name, f"{self.name} cannot encode the text"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, id: int, *, first: bool) -> bytes:
        return self._names[id].encode() if id < len(self._names) else self._words[id - len(self._names)]

    def vocabulary_metadata(self) -> dict[str, Any]:
        found = byte_level_metadata(self._tokenizer, self.vocab, self.name, space_prefix=False)
        for id, name in enumerate(self._names):
            found["tokenizer.ggml.tokens"][id], found["tokenizer.ggml.token_type"][id] = name, CONTROL
        return found

    def write_vocabulary(self, folder: Path) -> Mapping[str, Any]:
        shutil.copyfile(self._path, folder / "tekken.json")
        return {}


def _complaint(content: dict[str, Any]) -> str | None:
    """What is wrong with the content of a `tekken.json`, if anything is."""
    config, vocabulary, special = content["config"], content["vocab"], content.get("special_tokens")
    size, controls = config["default_vocab_size"], config["default_num_special_tokens"]
    if not isinstance(vocabulary, list) or not isinstance(special, list | None):
        return "its vocab and special_tokens must be lists"
    if type(size) is not int or type(controls) is not int:
        return "its default_vocab_size and default_num_special_tokens must be whole numbers"
    if not 0 < controls < size <= len(vocabulary) + controls:
        return f"it counts {shown(size)} tokens, {shown(controls)} of them special, and its vocab has {len(vocabulary)}"
    if not isinstance(config["pattern"], str):
        return f"its pattern is {shown(config['pattern'])}, which must be text"
    if special is None and config.get("version") not in _WITHOUT_LIST:
        return "it has no special_tokens"
    if special is not None and sorted(token["rank"] for token in special) != list(range(len(special))):
        return "its special_tokens must have the ranks from 0 on, each once"
    names = _names(content)
    if not all(isinstance(name, str) and name.encode() for name in names):
        return "the names of its special_tokens must be text"
    if len(names) != controls or len(set(names)) < controls or not {"<s>", "</s>"} <= set(names):
        return f"its special_tokens must be at most {controls} different names, with <s> and </s>"
    words = _words(content)
    if [token["rank"] for token in vocabulary] != list(range(len(vocabulary))) or len(set(words)) < len(words):
        return "its vocab must have the ranks from 0 on, and no token twice"
    if words[:256] != [bytes([byte]) for byte in range(256)]:
        return "the first tokens of its vocab must be the 256 bytes"
    return None


def _names(content: dict[str, Any]) -> list[str]:
    """The names of the control tokens, which have the first ids."""
    special = content.get("special_tokens")
    listed = _NAMES if special is None else [token["token_str"] for token in sorted(special, key=_rank)]
    return [*listed, *(f"<SPECIAL_{id}>" for id in range(len(listed), content["config"]["default_num_special_tokens"]))]


def _rank(token: dict[str, Any]) -> int:
    return token["rank"]


def _words(content: dict[str, Any]) -> list[bytes]:
    """The bytes of the other tokens, in the order of their ids."""
    config = content["config"]
    count = config["default_vocab_size"] - config["default_num_special_tokens"]
    return [base64.b64decode(token["token_bytes"], validate=True) for token in content["vocab"][:count]]


def _byte_level(words: Sequence[bytes], first_id: int, pattern: str) -> Tokenizer:
    """A tokenizer that merges in the order of the ranks, as tiktoken does.

    tiktoken merges the neighbours whose union has the lowest rank. So each way to cut a token into two others is a
    merge, with the rank of the token (as in transformers' `convert_slow_tokenizer`).
    """
    character = {byte: ord(shown) for shown, byte in BYTES.items()}
    texts = {word: word.decode("latin-1").translate(character) for word in words}
    ranks = {word: rank for rank, word in enumerate(words)}
    merges: list[tuple[str, str]] = []
    for word in words:
        halves = ((word[:cut], word[cut:]) for cut in range(1, len(word)))
        known = [(left, right) for left, right in halves if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(texts[left], texts[right]) for left, right in known]
    ids = {texts[word]: first_id + rank for word, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = PreTokenizer((pattern,)).build()
    return tokenizer
