"""What is asked of an engine."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Ge, Le

from ..checks import Count, CountOrZero, NotNegative, Positive, PositiveShare, Seed, Share, check_fields
from ..generation.guided import Grammar


# The most end tokens of a request, and the most alternatives that are reported for a token.
MOST_ENDS = 8
MOST_LOGPROBS = 20

_Penalty = Annotated[float, Ge(-2), Le(2)]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how an engine is to continue it.

    The tokens are those of [`mistral_eqx.generate`][] for this prompt alone, with a sampler of the same numbers, the
    key `jax.random.fold_in(jax.random.key(seed), sample)` and the processors `RepetitionPenalty`, `PresencePenalty`,
    `FrequencyPenalty`, `LogitBias`, `MinNewTokens`, in this order.

    **Attributes:**

    - `prompt`: token ids, or a text.
    - `max_new_tokens`: the most new tokens; by default as many as the engine's context has room for.
    - `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`: as in [`mistral_eqx.Sampler`][]; greedy unless one is
        given.
    - `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias`, `min_new_tokens`: the numbers of the
        processors above.
    - `seed`: determines all draws; by default another one for each request.
    - `sample`: the number of this answer among those with the same prompt and seed.
    - `stop`: strings that end the answer; the text leaves them out.
    - `eos_ids`: the tokens that end the answer; by default those of the model's config.
    - `logprobs`: how many likeliest tokens to report at each step; `None` for no log-probabilities.
    - `grammar`: makes the guide that allows only some tokens.
    - `adapter`: the name of one of the engine's LoRA adapters.
    - `timeout`: after how many seconds the answer ends, waiting included.
    - `skip_special`: whether the text leaves out the names of control tokens.
    """

    prompt: str | Sequence[int]
    max_new_tokens: Count | None = None
    temperature: NotNegative | None = None
    top_k: Count | None = None
    top_p: PositiveShare | None = None
    min_p: Share | None = None
    typical_p: PositiveShare | None = None
    repetition_penalty: Positive = 1.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    min_new_tokens: CountOrZero = 0
    seed: Seed | None = None
    sample: CountOrZero = 0
    stop: str | Sequence[str] = ()
    eos_ids: Sequence[int] | None = None
    logprobs: Annotated[int, Ge(0), Le(MOST_LOGPROBS)] | None = None
    grammar: Grammar | None = None
    adapter: str | None = None
    timeout: Positive | None = None
    skip_special: bool = True

    def __post_init__(self):
        # Prompts have too many entries to be checked one by one here; `Engine.submit` checks them.
        prompt: Any = self.prompt
        object.__setattr__(self, "prompt", "")
        check_fields(self)
        object.__setattr__(self, "prompt", prompt)
