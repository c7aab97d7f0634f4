"""Answers prompts: decodes, writes, and tells the metrics at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from . import processes
from .background import Background
from .continuing import continue_batch, options_of
from .progress import progress_bar, waiting
from .prompts import Prompt
from .report import Metrics, Stopwatch, Tally, show
from .texts import Write
from .wanted import Wanted


if TYPE_CHECKING:
    from ..generation.proposals import Speculate
    from ..nn import Mistral
    from ..text import AbstractTokenizer, Grammar


def answer_one(
    model: Mistral,
    tokenizer: AbstractTokenizer,
    prompt: Prompt,
    wanted: Wanted,
    metrics: Metrics | None,
    grammar: Grammar | None = None,
    *,
    templated: bool = False,
    speculate: Speculate | None = None,
):
    """Writes one text to stdout while it is decoded.

    **Arguments:**

    - `metrics`: about the model; `None` shows no metrics at all.
    - `grammar`: what the text must be, from `wanted`.
    - `templated`: whether the prompt is in the model's chat template.
    - `speculate`: what proposes tokens.
    """
    import mistral_eqx as mx

    text = mx.StopText(tokenizer, wanted.stop or (), after=prompt.ids)
    stopwatch = Stopwatch()
    interrupted, tokens = False, 0
    stream = None
    try:
        options = options_of(wanted, tokenizer, [prompt], grammar, speculate)
        stream = mx.stream(model, [prompt.ids], **options)
        with waiting(f"Reading {len(prompt.ids):,} tokens") as read:
            for (token,) in Background(lambda: stream):
                read()
                stopwatch.tick()
                tokens += 1
                _write(text.push(int(token)))
    except KeyboardInterrupt:
        interrupted = True
    _write(text.flush() + "\n")
    if metrics is not None:
        found = None if stream is None else stream.acceptance
        accepted = [("accepted", f"{found.accepted} of {found.proposed} proposed tokens")] if found else []
        show([("prompt", f"{len(prompt.ids)} tokens"), *metrics, *stopwatch.metrics(), *accepted])
    if interrupted:
        raise typer.Exit(130)
    at_once = tokens == 1 < wanted.max_new_tokens and text.stopped is None
    if at_once and not templated and tokenizer.chat_template is not None:
        processes.say("The model ended the text at once; it is tuned for conversations, so try --chat.")


def _write(text: str):
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def answer_all(
    model: Mistral,
    tokenizer: AbstractTokenizer,
    batches: Iterable[list[Prompt]],
    wanted: Wanted,
    size: int,
    metrics: Metrics | None,
    write: Write,
    grammar: Grammar | None = None,
    total: int | None = None,
    bar: bool = False,
    speculate: Speculate | None = None,
):
    """Writes the texts of each batch when all of them are complete, or when ctrl-C ends it.

    **Arguments:**

    - `size`: of a batch; the last one may have fewer prompts.
    - `metrics`: about the model; `None` shows no metrics at all.
    - `grammar`: what each text must be, from `wanted`.
    - `total`: how many prompts there are, if that is known.
    - `bar`: whether a bar tells how many are done.
    - `speculate`: what proposes tokens.
    """
    tally, done, interrupted, score = Tally(), 0, False, []
    with progress_bar("Generating", counts=True, shown=bar) as report:
        try:
            report(done, total)
            # Prompts may come slowly out of a pipe, but no more of them are read than are wanted.
            for batch in Background(lambda: batches, ahead=False):
                texts, interrupted = continue_batch(
                    model, tokenizer, batch, wanted, size if done else 0, grammar, speculate
                )
                for prompt, found in zip(batch, texts, strict=False):
                    write(prompt, found)
                every = [text for found in texts for text in found]
                read, new = sum(len(prompt.ids) for prompt in batch), sum(text.tokens for text in every)
                tally.add(len(batch), read, len(every), new)
                if interrupted:
                    break
                if len(every) == 1 and every[0].score is not None and not done:
                    # A text that has no heading.
                    score = [("score", f"{every[0].score:.4f}")]
                done += len(batch)
                report(done, total)
        except KeyboardInterrupt:
            interrupted = True
    if metrics is not None:
        show(tally.metrics(*metrics, *score))
    if interrupted:
        raise typer.Exit(130)
