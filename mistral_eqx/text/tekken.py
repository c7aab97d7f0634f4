"""Mistral's tekken vocabularies, through the mistral-common library."""

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from ..errors import InputError
from .settings import read_settings
from .tokenizer import AbstractTokenizer, control_pattern


@final
class TekkenTokenizer(AbstractTokenizer):
    """A `tekken.json`: byte-level BPE with the control tokens first.

    It takes the extra `tekken`.
    """

    def __init__(self, path: Path):
        """**Arguments:**

        - `path`: a file whose name has `tekken` in it.

        **Raises:** `ValueError` if the file is damaged or mistral-common is not installed.
        """
        if importlib.util.find_spec("mistral_common") is None:
            raise InputError(f"To read {path} takes the extra `tekken`: pip install 'mistral-eqx[tekken]'.")
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        try:
            self._tekken = Tekkenizer.from_file(path)
        except Exception as error:  # of many kinds, bare asserts among them
            reason = " ".join(f"{type(error).__name__}: {error}"[:200].split())
            raise InputError(f"{path} is no tekken.json, or it is damaged ({reason}); fetch it again.") from error
        self._named = SpecialTokenPolicy.KEEP
        settings = read_settings(path.parent)
        self.name = str(path)
        self.vocab = self._tekken.n_words
        self.bos_id = self._tekken.bos_id
        self.eos_ids = tuple(dict.fromkeys([self._tekken.eos_id, *settings.eos_ids]))
        self.adds_bos = settings.add_bos is not False
        self.chat_template = settings.chat_template
        if settings.template_tokens is not None:
            self.template_tokens = settings.template_tokens
        names = {id: self._tekken.id_to_piece(id) for id in sorted(self._tekken.special_ids)}
        self.control_tokens = {name: id for id, name in names.items()}
        self.control_pattern = control_pattern([("", self.control_tokens, "")])
        self.release_file = self._path = path

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        return self._tekken.encode(text, bos=False, eos=False)

    def token_bytes(self, id: int, *, first: bool) -> bytes:
        return self._tekken.id_to_byte_piece(id, special_token_policy=self._named)

    def write_vocabulary(self, folder: Path) -> Mapping[str, Any]:
        shutil.copyfile(self._path, folder / "tekken.json")
        return {}
