from .attention import Attention as Attention, visible as visible
from .block import Block as Block
from .cache import Cache as Cache, LayerCache as LayerCache
from .embedding import Embedding as Embedding, Unembedding as Unembedding
from .feed_forward import FeedForward as FeedForward
from .linear import Linear as Linear
from .model import Mistral as Mistral
from .norm import RMSNorm as RMSNorm
from .rotary import Rotary as Rotary, Rotation as Rotation
from .weight import AbstractWeight as AbstractWeight, DenseWeight as DenseWeight
