"""What is asked of a plan of training."""

import dataclasses

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
    """

    seq: int = 4096
    zero: int = 0
    accumulate: int = 1
    remat: str = "block"
    offload: bool = False

    def __post_init__(self):
        for what in ("seq", "accumulate"):
            if getattr(self, what) < 1:
                raise InputError(f"{what} is {getattr(self, what)}; it must be at least 1.")
        if self.remat not in REMATS:
            raise InputError(
                f"There is no rematerialisation {self.remat!r}; take one of {', '.join(map(repr, REMATS))}."
            )
