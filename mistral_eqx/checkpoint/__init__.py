from .hub import cache_folder as cache_folder, locate as locate
from .loading import load as load
from .opening import open_checkpoint as open_checkpoint
from .reader import Checkpoint as Checkpoint, LazyTensor as LazyTensor
from .writing import convert as convert, save as save
