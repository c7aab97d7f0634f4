from .best import KeepBest as KeepBest
from .csv import CSV as CSV
from .early_stop import EarlyStop as EarlyStop
from .progress import ProgressBar as ProgressBar
from .samples import Samples as Samples
from .tensorboard import TensorBoard as TensorBoard
from .wandb import WandB as WandB
