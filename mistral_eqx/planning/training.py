"""What is asked of a plan of training."""

import dataclasses

from ..checks import Count, CountOrZero, check_fields
from ..train import rematerialised


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is to be trained, for [`mistral_eqx.plan`][]: with AdamW, weights and moments in float32.

    **Attributes:**

    - `seq`: tokens of each row.
    - `zero`: the stage of [`mistral_eqx.train.Zero`][].
    - `accumulate`, `remat`: as of [`mistral_eqx.train.make_step`][].
    - `offload`: whether the moments are kept in the host's memory, as of
        [`init`][mistral_eqx.train.TrainState.init].

    **Raises:** `ValueError` if one is of another type or outside its range.
    """

    seq: Count = 4096
    zero: CountOrZero = 0
    accumulate: Count = 1
    remat: str = "block"
    offload: bool = False

    def __post_init__(self):
        check_fields(self)
        rematerialised(self.remat)
