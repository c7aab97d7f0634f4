"""Bodies of requests: the parameters of OpenAI's API that this server has, and some of vLLM's.

A parameter that is not here is refused. One that is null counts as left out.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


# The most choices of one request: its prompts times `n`.
MOST_CHOICES = 64

_Share = Annotated[float, Field(ge=0, le=1)]
_PositiveShare = Annotated[float, Field(gt=0, le=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Top = Annotated[int, Field(ge=0, le=20)]
_Label = Annotated[str, Field(max_length=512)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# Each token is compared with each beginning of a stop string.
_Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_listed), Field(max_length=8)
]
_TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(_Body):
    """What a stream has besides the answer."""

    include_usage: bool = False


class SamplingRequest(_Body):
    """What chat completions and completions have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: _PositiveShare = 1.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: Annotated[dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    stop: _Stops = []
    # vLLM's.
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 0
    min_p: _Share = 0.0
    typical_p: _PositiveShare = 1.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    ignore_eos: bool = False
    # These change nothing.
    user: _Label | None = None
    safety_identifier: _Label | None = None
    prompt_cache_key: _Label | None = None
    metadata: Annotated[dict[_Label, _Label], Field(max_length=16)] | None = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"

    @model_validator(mode="after")
    def _options_of_streams(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        return self

    def options(self) -> dict[str, Any]:
        """The same, by the names of [`mistral_eqx.engine.Request`][]."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k if self.top_k > 0 else None,
            "top_p": self.top_p if self.top_p < 1 else None,
            "min_p": self.min_p or None,
            "typical_p": self.typical_p if self.typical_p < 1 else None,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": {int(id): bias for id, bias in self.logit_bias.items()},
            "min_new_tokens": self.min_tokens,
            "seed": self.seed,
            "stop": tuple(self.stop),
        }


class ChatRequest(SamplingRequest):
    """The body of `/v1/chat/completions`. The text room checks `messages` and `tools`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: _Top = 0
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs=true")
        return self

    def options(self) -> dict[str, Any]:
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        log_probs = self.top_logprobs if self.logprobs else None
        return {**super().options(), "max_new_tokens": most, "logprobs": log_probs}


class CompletionRequest(SamplingRequest):
    """The body of `/v1/completions`: `prompt` is a text, token ids, or a list of either."""

    prompt: Any
    max_tokens: _Count = 16
    logprobs: _Top | None = None
    echo: bool = False
    best_of: _Count | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must be n")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs cannot be combined, because prompts have no log-probabilities here")
        return self

    def options(self) -> dict[str, Any]:
        return {**super().options(), "max_new_tokens": self.max_tokens, "logprobs": self.logprobs}


class TokenizeRequest(_Body):
    """The body of `/tokenize`: a text, or a conversation in the model's chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, and not both")
        return self
