from . import data as data
from .batch import Batch as Batch, Example as Example, cut as cut, one_a_row as one_a_row, pack as pack
from .callback import Callback as Callback, Run as Run
from .callbacks import (
    CSV as CSV,
    EarlyStop as EarlyStop,
    KeepBest as KeepBest,
    ProgressBar as ProgressBar,
    Samples as Samples,
    TensorBoard as TensorBoard,
    WandB as WandB,
)
from .checkpoints import Checkpoints as Checkpoints
from .data import Batches as Batches, batches as batches, tokenise as tokenise
from .disk import DiskStep as DiskStep
from .evaluation import Evaluation as Evaluation, make_evaluation as make_evaluation
from .loss import RouterLosses as RouterLosses, Sums as Sums, loss_sums as loss_sums
from .objective import (
    bert_mask as bert_mask,
    causal as causal,
    chat as chat,
    drop_spans as drop_spans,
    mass as mass,
    prefix_lm as prefix_lm,
    replace_spans as replace_spans,
    scheduled_sampling as scheduled_sampling,
)
from .offload import HOST as HOST, is_offloaded as is_offloaded
from .optimizer import adamw as adamw, decayed as decayed, warmup_cosine as warmup_cosine, wsd as wsd
from .remat import rematerialised as rematerialised
from .step import Metrics as Metrics, Step as Step, TrainState as TrainState, make_step as make_step
from .throughput import flops_per_token as flops_per_token, peak_flops as peak_flops
from .trained import trained as trained
from .trainer import Trainer as Trainer
from .zero import Zero as Zero
