"""Conversations in the formats of Mistral's release files, through the mistral-common library."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

from ..errors import InputError


def encode_instruct(release_file: Path, messages: list[dict[str, Any]]) -> list[int]:
    """A conversation as token ids, ready for the assistant's answer.

    **Arguments:**

    - `release_file`: a `tekken.json` or `tokenizer.model.v1`, `.v2`, ...
    - `messages`: each with `"role"` and `"content"`. If the last is the assistant's, it is closed.

    **Returns:** the ids. What the messages say cannot become a control token.

    **Raises:** `ValueError` if mistral-common is not installed, refuses the messages, or the file does not tell its
        version.
    """
    if importlib.util.find_spec("mistral_common") is None:
        raise InputError(
            f"{release_file} has no chat template, and Mistral's own format takes the extra `tekken`: "
            "pip install 'mistral-eqx[tekken]'."
        )
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from pydantic import ValidationError

    closed = messages[-1]["role"] == "assistant"
    try:
        request = ChatCompletionRequest.model_validate({"messages": messages})
        return list(
            _tokenizer(release_file, release_file.stat().st_mtime_ns, closed).encode_chat_completion(request).tokens
        )
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise InputError(f"Mistral's format refuses the conversation at {place}: {wrong['msg']}.") from error
    except MistralCommonException as error:
        raise InputError(f"Mistral's format refuses the conversation: {error}.") from error


@functools.lru_cache(maxsize=2)
def _tokenizer(release_file: Path, changed: int, closed: bool):
    """mistral-common's tokenizer; `changed` keeps one apart from an earlier file of that name."""
    from mistral_common.protocol.instruct.normalize import get_normalizer
    from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV3, InstructTokenizerV7
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    mode = ValidationMode.finetuning if closed else ValidationMode.test
    if release_file.suffix != ".model":
        return MistralTokenizer.from_file(release_file, mode)
    # Without a version in its name the control tokens tell it, from v3 on.
    controls = SentencePieceTokenizer(release_file)
    if controls.is_special("[SYSTEM_PROMPT]"):
        version, format = TokenizerVersion.v7, InstructTokenizerV7
    elif controls.is_special("[INST]"):
        version, format = TokenizerVersion.v3, InstructTokenizerV3
    else:
        raise InputError(
            f"{release_file} has no chat template, and does not tell whether it is one of Mistral's; "
            f"if so, rename it to {release_file.name}.v1, else put a chat_template.jinja beside it."
        )
    return MistralTokenizer(
        format(SentencePieceTokenizer(release_file, version)),
        validator=get_validator(version, mode),
        request_normalizer=get_normalizer(version, None),
    )
