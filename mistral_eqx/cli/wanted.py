"""What the options of `mistral-eqx generate` ask for, and what of it does not go together."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..errors import InputError
from .sampling import make_sampler


if TYPE_CHECKING:
    from ..generation import Sampler


_NOT_WITH_BEAMS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_new_tokens",
    "stop",
    "logprobs",
    "prefill_chunk",
)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How prompts are to be continued; each attribute is the option of its name, `None` if that was not given."""

    max_new_tokens: int
    seed: int
    ignore_eos: bool
    stop: tuple[str, ...]
    num_samples: int | None
    num_beams: int | None
    length_penalty: float | None
    logprobs: int | None
    prefill_chunk: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    min_new_tokens: int | None

    @property
    def samples(self) -> int:
        """How many texts each prompt gets."""
        return self.num_samples or 1

    @property
    def plain(self) -> bool:
        """Whether a prompt gets one text, which is there token by token."""
        return self.samples == 1 and self.num_beams is None and self.logprobs is None

    def sampler(self) -> Sampler:
        """How tokens are chosen."""
        return make_sampler(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            min_new_tokens=self.min_new_tokens or 0,
        )

    def check(self):
        """Refuses what is outside its range, or does not go together; no model is needed for that.

        **Raises:** `ValueError` that names the options.
        """
        from ..text.stops import checked_stops

        sampler = self.sampler()
        checked_stops(self.stop)
        if (self.min_new_tokens or 0) > self.max_new_tokens:
            raise InputError(
                f"--min-new-tokens is {self.min_new_tokens}, but a text gets at most {self.max_new_tokens}; ask for "
                "more with --max-new-tokens."
            )
        if self.min_new_tokens and self.ignore_eos:
            raise InputError(
                "--min-new-tokens holds back the tokens that end a text, and with --ignore-eos none does; leave one "
                "of the two out."
            )
        if self.num_beams is not None:
            self._check_beams(self.num_beams)
        elif self.length_penalty is not None:
            raise InputError("--length-penalty ranks the texts of a beam search; add --num-beams, or leave it out.")
        elif self.samples > 1 and sampler.greedy:
            raise InputError(
                f"--num-samples is {self.samples}, but without drawing all texts of a prompt are the same; add "
                "--temperature, or --num-beams for the best ones of a beam search."
            )

    def _check_beams(self, num_beams: int):
        for name in _NOT_WITH_BEAMS:
            if getattr(self, name) not in (None, ()):
                raise InputError(
                    f"--{name.replace('_', '-')} does not combine with --num-beams, which searches for the likeliest "
                    "texts by the model's own probabilities; leave one of the two out."
                )
        if self.samples > num_beams:
            raise InputError(
                f"--num-samples is {self.samples}, more than the {num_beams} of --num-beams; a beam search has as many "
                "texts as beams."
            )

    def check_vocabulary(self, vocab: int):
        """Refuses what asks for more tokens than there are.

        **Raises:** `ValueError` that names the option.
        """
        for option, value in (("--num-beams", self.num_beams), ("--logprobs", self.logprobs)):
            if value is not None and value > vocab:
                raise InputError(f"{option} is {value}, more than the {vocab} tokens of the vocabulary; ask for fewer.")
