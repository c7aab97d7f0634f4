from .loop import Generated as Generated, generate as generate
from .sampler import Sampler as Sampler
from .stream import Conversation as Conversation, stream as stream
