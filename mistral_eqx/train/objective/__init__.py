from .causal import causal as causal, prefix_lm as prefix_lm
from .chat import chat as chat
from .masking import bert_mask as bert_mask, mass as mass
from .scheduled import scheduled_sampling as scheduled_sampling
from .spans import drop_spans as drop_spans, replace_spans as replace_spans
