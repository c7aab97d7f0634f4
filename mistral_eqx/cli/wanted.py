"""What the options of `mistral-eqx generate` ask for, and what of it does not go together."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import checks
from ..errors import InputError
from .options import BEAMS, GRAMMAR, CacheDType, MaxNewTokens, SamplingOptions, Seed, Stop, within


if TYPE_CHECKING:
    from ..text import AbstractTokenizer, Grammar


_GRAMMARS = ("json_schema", "regex", "grammar")
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
    *_GRAMMARS,
)


@dataclasses.dataclass(frozen=True)
class Wanted(SamplingOptions):
    """How prompts are to be continued; each attribute is the option of its name, `None` if that was not given."""

    max_new_tokens: MaxNewTokens = 64
    min_new_tokens: Annotated[
        int | None,
        typer.Option(callback=within(checks.CountOrZero), help="How many tokens to add before an end token may come."),
    ] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after a token that ends a text.")] = False
    stop: Stop = None
    json_schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write JSON that the JSON schema in this file accepts.", rich_help_panel=GRAMMAR
        ),
    ] = None
    regex: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Write a text that this regular expression matches as a whole.",
            rich_help_panel=GRAMMAR,
        ),
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a text of the Lark grammar in this file.", rich_help_panel=GRAMMAR),
    ] = None
    num_samples: Annotated[
        int | None,
        typer.Option(
            callback=within(checks.Count),
            help="How many texts each prompt gets: drawn ones, or with --num-beams the best ones; 1 by default.",
        ),
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option(
            callback=within(checks.CountOrZero),
            help="Show the log-probability of each token, and those of this many likeliest ones.",
        ),
    ] = None
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            callback=within(checks.Count), help="Read a prompt so many tokens at a time; fewer take less memory."
        ),
    ] = None
    cache_dtype: CacheDType = None
    seed: Seed = 0
    num_beams: Annotated[
        int | None,
        typer.Option(
            callback=within(checks.Count),
            help="Search for the likeliest text as a whole, with this many beams.",
            rich_help_panel=BEAMS,
        ),
    ] = None
    length_penalty: Annotated[
        float | None,
        typer.Option(
            callback=within(float),
            help="Above 0 a beam search favours long texts, below 0 short ones; 1 by default.",
            rich_help_panel=BEAMS,
        ),
    ] = None

    @property
    def samples(self) -> int:
        """How many texts each prompt gets."""
        return self.num_samples or 1

    @property
    def plain(self) -> bool:
        """Whether a prompt gets one text, which is there token by token."""
        return self.samples == 1 and self.num_beams is None and self.logprobs is None

    def check(self):
        """Refuses what is outside its range, or does not go together; no model is needed for that.

        **Raises:** `ValueError` that names the options.
        """
        from ..text.stops import checked_stops

        sampler = self.sampler(self.min_new_tokens or 0)
        checked_stops(self.stop or ())
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
        self._check_grammar()
        if self.num_beams is not None:
            self._check_beams(self.num_beams)
        elif self.length_penalty is not None:
            raise InputError("--length-penalty ranks the texts of a beam search; add --num-beams, or leave it out.")
        elif self.samples > 1 and sampler.greedy:
            raise InputError(
                f"--num-samples is {self.samples}, but without drawing all texts of a prompt are the same; add "
                "--temperature, or --num-beams for the best ones of a beam search."
            )

    def _check_grammar(self):
        given = [f"--{name.replace('_', '-')}" for name in _GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{given[0]} and {given[1]} both say what a text must be; leave one of the two out.")
        if given and self.ignore_eos:
            raise InputError(
                f"With {given[0]} a text ends with an end token, and --ignore-eos continues after it; leave one of the "
                "two out."
            )

    def check_speculation(self):
        """Refuses what does not go together with proposed tokens.

        **Raises:** `ValueError` that names the options.
        """
        for name in ("num_beams", "logprobs", *_GRAMMARS):
            if getattr(self, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} does not combine with --prompt-lookup and --draft; leave one of them out.")

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

    def read_grammar(self, tokenizer: "AbstractTokenizer") -> "Grammar | None":
        """What a text must be, if an option says it.

        **Raises:** `ValueError` if the file or the pattern cannot be used.
        """
        from ..documents import read_json, read_text
        from ..text import Grammar

        if self.json_schema is not None:
            return Grammar.json_schema(tokenizer, read_json(self.json_schema))
        if self.grammar is not None:
            return Grammar.lark(tokenizer, read_text(self.grammar))
        return None if self.regex is None else Grammar.regex(tokenizer, self.regex)

    def check_vocabulary(self, vocab: int):
        """Refuses what asks for more tokens than there are.

        **Raises:** `ValueError` that names the option.
        """
        for option, value in (("--num-beams", self.num_beams), ("--logprobs", self.logprobs)):
            if value is not None and value > vocab:
                raise InputError(f"{option} is {value}, more than the {vocab} tokens of the vocabulary; ask for fewer.")
