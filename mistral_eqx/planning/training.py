"""The options of a plan of training."""

import dataclasses
from typing import Literal

from ..checks import Count, CountOrZero, check_fields
from ..errors import InputError
from ..train import rematerialised


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained, for [`mistral_eqx.plan`][]: with AdamW, master weights and moments in float32.

    **Attributes:**

    - `seq`: the number of tokens of each row.
    - `zero`: the stage of [`mistral_eqx.train.Zero`][].
    - `accumulate`, `remat`: as for [`mistral_eqx.train.make_step`][].
    - `schedule`: as for [`mistral_eqx.train.make_step`][], where the strategy splits `layers`.
    - `offload`: whether the moments are kept in host memory, as for
        [`init`][mistral_eqx.train.TrainState.init].

    **Raises:** `ValueError` if a field has the wrong type or is outside its range.
    """

    seq: Count = 4096
    zero: CountOrZero = 0
    accumulate: Count = 1
    remat: str = "block"
    offload: bool = False
    schedule: Literal["gpipe", "1f1b"] = "gpipe"

    def __post_init__(self):
        check_fields(self)
        rematerialised(self.remat)

    def check_stages(self, stages: int):
        """Checks that there are as many micro-batches as stages.

        **Raises:** `ValueError`.
        """
        if self.accumulate < stages:
            raise InputError(
                f"With {self.accumulate} micro-batches, some of {stages} stages always wait; let accumulate be at "
                f"least {stages}."
            )

    def ticks(self, stages: int) -> int:
        """The ticks of a pipeline with so many stages, each of which has work in `accumulate` of them."""
        return self.accumulate + (2 if self.schedule == "1f1b" else 1) * (stages - 1)
