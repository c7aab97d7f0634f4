"""What is asked of a plan of training."""

import dataclasses

from ..checks import Count, CountOrZero, check_fields
from ..errors import InputError
from ..train import REMATS


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
        if self.remat not in REMATS:
            raise InputError(
                f"There is no rematerialisation {self.remat!r}; take one of {', '.join(map(repr, REMATS))}.",
                key="remat",
            )
