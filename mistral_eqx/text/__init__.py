from .chat import encode_chat as encode_chat, render_chat as render_chat
from .detokenizer import Detokenizer as Detokenizer
from .grammar import Grammar as Grammar
from .huggingface import HuggingFaceTokenizer as HuggingFaceTokenizer
from .load import load_tokenizer as load_tokenizer
from .replies import (
    Reply as Reply,
    ReplyParser as ReplyParser,
    ToolCall as ToolCall,
    parse_reply as parse_reply,
)
from .sentencepiece import SentencePieceTokenizer as SentencePieceTokenizer
from .stops import StopText as StopText
from .tekken import TekkenTokenizer as TekkenTokenizer
from .tokenizer import AbstractTokenizer as AbstractTokenizer
