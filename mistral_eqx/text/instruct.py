"""Encodes conversations in the formats of Mistral's release files, with the mistral-common library."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

from ..errors import InputError
from .libraries import as_input_error


def encode_instruct(
    release_file: Path,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    reasoning_effort: str | None = None,
    response_format: dict[str, Any] | None = None,
) -> list[int]:
    """Encodes a conversation as token ids.

    **Arguments:**

    - `release_file`: a `tekken.json` or `tokenizer.model.v1`, `.v2`, ...
    - `messages`: each with `"role"` and `"content"`. After a last message of the assistant, the ids end with the
        end-of-sequence token; otherwise they are the prompt of the assistant's answer.
    - `tools`: the tools that the model may call, as from `checked_tools`.
    - `reasoning_effort`, `response_format`: settings of version 15.

    **Returns:** the ids. The content of a message cannot become a control token.

    **Raises:** `ValueError` if mistral-common is not installed, if it refuses the messages, or if the version of the
        format is unknown.
    """
    if importlib.util.find_spec("mistral_common") is None:
        raise InputError(
            f"{release_file} has no chat template, and Mistral's own format needs the extra `tekken`: "
            "pip install 'mistral-eqx[tekken]'."
        )
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from pydantic import ValidationError

    closed = messages[-1]["role"] == "assistant"
    with as_input_error(release_file, f"mistral-common cannot read {release_file}", "update mistral-common"):
        tokenizer = _tokenizer(release_file, release_file.stat().st_mtime_ns, closed)
    if tools and tokenizer.instruct_tokenizer.tokenizer.version == TokenizerVersion.v1:
        raise InputError(f"{release_file} has version 1 of Mistral's format, which has no tools; leave out tools.")
    # mistral-common ignores a setting for which the file has no rules.
    builder = tokenizer.instruct_tokenizer.tokenizer.model_settings_builder
    settings = {"reasoning_effort": reasoning_effort, "json_schema": response_format}
    for name, value in settings.items():
        if value is not None and getattr(builder, name, None) is None:
            raise InputError(
                f"Mistral's format refuses the conversation: the settings of {release_file} have no {name}; leave out "
                f"{name}.",
                key=name,
            )
    given = {
        "messages": [_with_thoughts(message) for message in messages],
        "tools": [_with_all_keys(tool) for tool in tools or []],
        "reasoning_effort": reasoning_effort,
        **({} if response_format is None else {"response_format": response_format}),
    }
    try:
        return list(tokenizer.encode_chat_completion(ChatCompletionRequest.model_validate(given)).tokens)
    except ValidationError as error:
        wrong = error.errors()[0]
        location = ".".join(map(str, wrong["loc"]))
        raise InputError(f"Mistral's format refuses the conversation at {location}: {wrong['msg']}.") from error
    # Some versions only assert what they cannot write, such as reasoning without tokens for it.
    except (MistralCommonException, ValueError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"Mistral's format refuses the conversation: {reason}.") from error


def _with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its reasoning as mistral-common takes it: a chunk of the content."""
    if "reasoning_content" not in message:
        return message
    reasoning, content = message["reasoning_content"], message.get("content")
    text = [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []
    rest = {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking", "reasoning")}
    return {**rest, "content": [{"type": "thinking", "thinking": reasoning}, *text]}


def _with_all_keys(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the keys that mistral-common writes even if a user leaves them out."""
    given = {key: value for key, value in tool["function"].items() if value is not None}
    return {**tool, "function": {"description": "", "parameters": {}, **given}}


@functools.lru_cache(maxsize=2)
def _tokenizer(release_file: Path, changed: int, closed: bool):
    """mistral-common's tokenizer. `changed` keeps the cache from using an earlier file of the same name."""
    from mistral_common.protocol.instruct.normalize import get_normalizer
    from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV3, InstructTokenizerV7
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    mode = ValidationMode.finetuning if closed else ValidationMode.test
    if release_file.suffix != ".model":
        return MistralTokenizer.from_file(release_file, mode)
    # A file without a version in its name has the version that its control tokens imply, from v3 on.
    controls = SentencePieceTokenizer(release_file)
    if controls.is_special("[SYSTEM_PROMPT]"):
        version, format = TokenizerVersion.v7, InstructTokenizerV7
    elif controls.is_special("[INST]"):
        version, format = TokenizerVersion.v3, InstructTokenizerV3
    else:
        raise InputError(
            f"{release_file} has no chat template, and cannot be recognised as one of Mistral's; "
            f"if it is, rename it to {release_file.name}.v1, otherwise add a chat_template.jinja to its folder."
        )
    return MistralTokenizer(
        format(SentencePieceTokenizer(release_file, version)),
        validator=get_validator(version, mode),
        request_normalizer=get_normalizer(version, None),
    )
