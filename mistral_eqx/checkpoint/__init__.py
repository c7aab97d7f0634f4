from .hub import cache_folder as cache_folder, locate as locate
from .loading import load as load, load_stacked as load_stacked
from .opening import open_checkpoint as open_checkpoint
from .peft import load_lora as load_lora, save_lora as save_lora
from .reader import Checkpoint as Checkpoint, LazyTensor as LazyTensor
from .writing import convert as convert, save as save
