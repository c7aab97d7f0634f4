"""The options of a plan of training."""

import dataclasses

from ..checks import Count, CountOrZero, check_fields
from ..train import rematerialised


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained, for [`mistral_eqx.plan`][]: with AdamW, master weights and moments in float32.

    **Attributes:**

    - `seq`: the number of tokens of each row.
    - `zero`: the stage of [`mistral_eqx.train.Zero`][].
    - `accumulate`, `remat`: as for [`mistral_eqx.train.make_step`][].
    - `offload`: whether the moments are kept in host memory, as for
        [`init`][mistral_eqx.train.TrainState.init].

    **Raises:** `ValueError` if a field has the wrong type or is outside its range.
    """

    seq: Count = 4096
    zero: CountOrZero = 0
    accumulate: Count = 1
    remat: str = "block"
    offload: bool = False

    def __post_init__(self):
        check_fields(self)
        rematerialised(self.remat)
