from .beam import Beams as Beams, beam_search as beam_search
from .loop import Generated as Generated, Prefix as Prefix, generate as generate
from .prefix import prefill as prefill
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
from .sampler import Sampler as Sampler
from .stream import Conversation as Conversation, stream as stream
