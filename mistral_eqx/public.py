"""The public names of the package, in one place; `mistral_eqx` has each of them."""

from importlib.metadata import version as _version

from . import (
    generation as generation,
    lora as lora,
    nn as nn,
    parallel as parallel,
    planning as planning,
    quant as quant,
    train as train,
)
from .checkpoint import (
    load as load,
    load_lora as load_lora,
    load_stacked as load_stacked,
    save as save,
    save_lora as save_lora,
)
from .config import Latent as Latent, MistralConfig as MistralConfig, Routing as Routing
from .conversion import convert as convert
from .engine import Engine as Engine, Request as Request
from .errors import InputError as InputError
from .evaluate import (
    Perplexity as Perplexity,
    Scores as Scores,
    perplexity as perplexity,
    score as score,
)
from .generation import (
    AbstractProcessor as AbstractProcessor,
    Acceptance as Acceptance,
    BannedTokens as BannedTokens,
    Beams as Beams,
    Constraint as Constraint,
    Conversation as Conversation,
    Draft as Draft,
    FrequencyPenalty as FrequencyPenalty,
    Generated as Generated,
    Guided as Guided,
    LogitBias as LogitBias,
    MinNewTokens as MinNewTokens,
    Prefix as Prefix,
    PresencePenalty as PresencePenalty,
    PromptLookup as PromptLookup,
    RepetitionPenalty as RepetitionPenalty,
    Sampler as Sampler,
    beam_search as beam_search,
    generate as generate,
    prefill as prefill,
    stream as stream,
)
from .lora import apply_lora as apply_lora, merge_lora as merge_lora
from .nn import Mistral as Mistral
from .parallel import (
    EXPERTS as EXPERTS,
    HEAD_DIM as HEAD_DIM,
    HEADS as HEADS,
    HEADS_X_HEAD_DIM as HEADS_X_HEAD_DIM,
    HEADS_X_KV_SEQ as HEADS_X_KV_SEQ,
    KV_REPLICATED as KV_REPLICATED,
    SEQUENCE_PARALLEL as SEQUENCE_PARALLEL,
    SINGLE as SINGLE,
    Strategy as Strategy,
    einshard as einshard,
    make_mesh as make_mesh,
    shard as shard,
    strategies as strategies,
)
from .planning import plan as plan
from .presets import PRESETS as PRESETS
from .pretrained import from_pretrained as from_pretrained
from .quant import (
    AWQ as AWQ,
    FP8 as FP8,
    GGUF as GGUF,
    GPTQ as GPTQ,
    NF4 as NF4,
    RTN as RTN,
    Int8 as Int8,
    dequantize as dequantize,
    quantize as quantize,
)
from .text import (
    Detokenizer as Detokenizer,
    Grammar as Grammar,
    Reply as Reply,
    ReplyParser as ReplyParser,
    StopText as StopText,
    ToolCall as ToolCall,
    encode_chat as encode_chat,
    load_tokenizer as load_tokenizer,
    parse_reply as parse_reply,
    render_chat as render_chat,
)
from .train import Trainer as Trainer


__version__ = _version("mistral-eqx")
