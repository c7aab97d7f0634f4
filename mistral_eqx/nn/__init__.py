from .attention import Attention as Attention
from .block import Block as Block, StagedBlock as StagedBlock
from .buffer import Buffer as Buffer
from .cache import (
    AbstractLayerCache as AbstractLayerCache,
    Cache as Cache,
    FullCache as FullCache,
    LatentCache as LatentCache,
    WindowCache as WindowCache,
)
from .context import Context as Context
from .cross_entropy import Likelihood as Likelihood, log_likelihood as log_likelihood
from .embedding import Embedding as Embedding, Unembedding as Unembedding
from .experts import ExpertLinear as ExpertLinear, Experts as Experts, Router as Router
from .feed_forward import FeedForward as FeedForward
from .kernels import flash_attention as flash_attention
from .latent_attention import LatentAttention as LatentAttention, latent_operations as latent_operations
from .linear import Linear as Linear
from .mask import Span as Span, attention_mask as attention_mask
from .model import Mistral as Mistral
from .norm import RMSNorm as RMSNorm
from .pipeline import (
    in_turn as in_turn,
    one_forward_one_backward as one_forward_one_backward,
    pipelined as pipelined,
)
from .rotary import Rotation as Rotation
from .router_sums import RouterSums as RouterSums
from .stack import (
    Gathering as Gathering,
    Passed as Passed,
    Stacked as Stacked,
    in_stages as in_stages,
    stack as stack,
    unstack as unstack,
)
from .weight import AbstractWeight as AbstractWeight, DenseWeight as DenseWeight
