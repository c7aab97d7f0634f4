from .beam import Beams as Beams, beam_search as beam_search
from .generation import Generated as Generated, generate as generate
from .guided import Grammar as Grammar, Guide as Guide, Guided as Guided
from .prefix import Prefix as Prefix, prefill as prefill
from .processors import (
    AbstractProcessor as AbstractProcessor,
    BannedTokens as BannedTokens,
    Constraint as Constraint,
    FrequencyPenalty as FrequencyPenalty,
    LogitBias as LogitBias,
    MinNewTokens as MinNewTokens,
    PresencePenalty as PresencePenalty,
    RepetitionPenalty as RepetitionPenalty,
)
from .proposals import Draft as Draft, PromptLookup as PromptLookup
from .sampler import Sampler as Sampler
from .speculation import Acceptance as Acceptance
from .streaming import Conversation as Conversation, stream as stream
