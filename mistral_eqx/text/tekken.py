"""Mistral's tekken vocabularies, with the mistral-common library."""

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from ..documents import read_text, shown
from ..errors import InputError
from .libraries import LARGEST, as_input_error
from .settings import read_settings
from .tokenizer import AbstractTokenizer, control_pattern


# If a pattern covers this text, it covers any text.
_PROBE = "A word, 12 \u00e9\u5929\n\t!"


@final
class TekkenTokenizer(AbstractTokenizer):
    """A `tekken.json`: byte-level BPE with the control tokens first.

    It needs the extra `tekken`.
    """

    def __init__(self, path: Path):
        """**Arguments:**

        - `path`: a file with `tekken` in its name.

        **Raises:** `ValueError` if the file is damaged or mistral-common is not installed.
        """
        if importlib.util.find_spec("mistral_common") is None:
            raise InputError(f"Reading {path} needs the extra `tekken`: pip install 'mistral-eqx[tekken]'.")
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        _check(path)
        with as_input_error(path, f"{path} is not a tekken.json, or it is damaged"):
            self._tekken = Tekkenizer.from_file(path)
            self.bos_id, eos_id = self._tekken.bos_id, self._tekken.eos_id
            if self._tekken.decode(self._tekken.encode(_PROBE, bos=False, eos=False)) != _PROBE:
                raise ValueError("its pattern does not cover all of a text")
            names = {id: self._tekken.id_to_piece(id) for id in sorted(self._tekken.special_ids)}
        self._named = SpecialTokenPolicy.KEEP
        settings = read_settings(path.parent)
        self.name = str(path)
        self.vocab = self._tekken.n_words
        self.eos_ids = tuple(dict.fromkeys([eos_id, *settings.eos_ids]))
        self.adds_bos = settings.add_bos is not False
        self.chat_template = settings.chat_template
        if settings.template_tokens is not None:
            self.template_tokens = settings.template_tokens
        self.control_tokens = {name: id for id, name in names.items()}
        self.control_pattern = control_pattern([("", self.control_tokens, "")])
        self.release_file = self._path = path

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        with as_input_error(self.name, f"{self.name} cannot encode the text"):
            return self._tekken.encode(text, bos=False, eos=False)

    def token_bytes(self, id: int, *, first: bool) -> bytes:
        return self._tekken.id_to_byte_piece(id, special_token_policy=self._named)

    def write_vocabulary(self, folder: Path) -> Mapping[str, Any]:
        shutil.copyfile(self._path, folder / "tekken.json")
        return {}


def _check(path: Path):
    """Refuses wrong numbers of tokens: the library trusts them, and would make as many tokens as they say.

    **Raises:** `ValueError`.
    """
    with as_input_error(path, f"{path} is not a tekken.json, or it is damaged"):
        content = json.loads(read_text(path, LARGEST))
        config, vocabulary, special = content["config"], content["vocab"], content.get("special_tokens")
        size, controls = config["default_vocab_size"], config["default_num_special_tokens"]
    complaint = None
    if not isinstance(vocabulary, list) or not isinstance(special, list | None):
        complaint = "its vocab and special_tokens must be lists"
    elif type(size) is not int or type(controls) is not int:
        complaint = "its default_vocab_size and default_num_special_tokens must be whole numbers"
    elif not 0 < controls < size <= len(vocabulary) + controls:
        complaint = (
            f"it counts {shown(size)} tokens, {shown(controls)} of them special, and its vocab has {len(vocabulary)}"
        )
    elif special is not None and _ranks(special) != list(range(len(special))):
        complaint = "its special_tokens must have the ranks from 0 on, each once"
    if complaint:
        raise InputError(f"{path} is not a tekken.json, or it is damaged ({complaint}); fetch it again.", file=path)


def _ranks(tokens: list[Any]) -> list[int]:
    """The ranks of tokens that are whole numbers, in ascending order."""
    ranks = [token.get("rank") for token in tokens if isinstance(token, dict)]
    return sorted(rank for rank in ranks if type(rank) is int)
