from .arguments import count_devices as count_devices
from .chips import CHIPS as CHIPS, Chip as Chip
from .communication import (
    Collective as Collective,
    decoding_step as decoding_step,
    forward_pass as forward_pass,
    prefill as prefill,
)
from .exposure import Exposed as Exposed, exposed as exposed, ring_wait as ring_wait
from .fitting import Holding as Holding, smallest as smallest
from .limits import HOP_SECONDS as HOP_SECONDS, exchange_seconds as exchange_seconds, roofline as roofline
from .pictures import picture as picture
from .planning import plan as plan
from .ranking import Estimate as Estimate, Ranking as Ranking, rank as rank
from .report import (
    Exchange as Exchange,
    Memory as Memory,
    Phase as Phase,
    Report as Report,
    Roofline as Roofline,
)
from .tables import holdings_table as holdings_table, ranking_table as ranking_table, table as table
from .training import Training as Training
from .training_communication import training_step as training_step
from .work import operations as operations, weights_read as weights_read
