"""`mistral-eqx generate`: what follows a prompt, or each of many."""

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import interrupts
from ..checks import Count
from ..errors import InputError
from . import options, processes
from .options import PROMPTS, within
from .wanted import Wanted


if TYPE_CHECKING:
    from .prompts import Prompt


@dataclasses.dataclass(frozen=True)
class Files:
    """What prompts are read from and written to, and how."""

    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Make each prompt a user's message in the model's chat template, as instruction-tuned models need it.",
            rich_help_panel=PROMPTS,
        ),
    ] = False
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Continue the prompts of a file, or of stdin if it is '-'. A line is a JSON string, or an object with "
            '"prompt" or "messages"; each becomes an object with "text" added.',
            rich_help_panel=PROMPTS,
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where --prompts writes; by default stdout.",
            rich_help_panel=PROMPTS,
        ),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --output.", rich_help_panel=PROMPTS)
    ] = False
    batch_size: Annotated[
        int,
        typer.Option(callback=within(Count), help="How many prompts are decoded together.", rich_help_panel=PROMPTS),
    ] = 8


# No token has more characters. A prompt that no context of such tokens can hold is not encoded, which may take minutes.
_LONGEST_TOKEN = 1024


@options.flat
def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT", help="Texts to continue; '-', or nothing where stdin is piped, reads one from stdin."
        ),
    ] = None,
    *,
    model: options.ModelOptions,
    files: Files,
    wanted: Wanted,
    speculation: options.SpeculationOptions,
    split: options.ProcessOptions,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
):
    """Continue a prompt. Or several, or those of a file.

    The continuation goes to stdout as it is decoded, without the prompt; metrics go to stderr. The likeliest token is
    taken each time unless --temperature, --top-k, --top-p, --min-p or --typical-p is given, or --num-beams. Several
    texts stand under headings.

    With --mesh the model is split over several devices, and with --coordinator over several processes, each started
    with the same command but for --process-id.
    """
    import mistral_eqx as mx

    from ..checkpoint import open_checkpoint
    from ..generation.reading import check_context
    from ..parallel.agreement import broadcast, check_same
    from ..text import encode_chat
    from .answering import answer_all, answer_one
    from .devices import Devices
    from .loading import Speculating, load, locate, precision
    from .prompts import count_file, encode_texts, expect_file, in_batches, read_file, read_texts, share_batches
    from .texts import expect_output, json_lines, readable

    wanted.check()
    if speculation != options.SpeculationOptions():
        wanted.check_speculation()
    arguments, prompts, output = prompt or [], files.prompts, files.output
    if prompts is not None and arguments:
        raise InputError("There are prompts as arguments and a file of --prompts; give one or the other.")
    if prompts is None and output is not None:
        raise InputError("--output is for the texts of --prompts; send those of other prompts on with '>'.")
    if output is None and files.overwrite:
        raise InputError("--overwrite replaces the file of --output, which is not given; leave it out.")
    # What is piped in reaches process 0, which has to know first that there are others.
    from_stdin = prompts is None and (not arguments or "-" in arguments)
    texts = read_texts(arguments) if prompts is None and (split.alone or not from_stdin) else None
    devices = Devices(split)
    first = processes.number() == 0
    if prompts is None and texts is None:
        texts = json.loads(broadcast(json.dumps(read_texts(arguments)) if first else None))
    if prompts is not None and first:
        expect_file(prompts)
    model.check_adapter()
    path = locate(model.model)
    if prompts is not None and output is not None and first:
        expect_output(output, files.overwrite, prompts, path)
    start = time.perf_counter()
    # All that can be refused without the weights is refused before they are read.
    config = open_checkpoint(path).config
    wanted.check_vocabulary(config.vocab)
    speculating = Speculating(speculation, config.vocab)
    mesh, strategy, where = devices.place(config)
    speculating.check(mesh, strategy)
    tokenizer = mx.load_tokenizer(path)
    grammar = wanted.read_grammar(tokenizer)

    def encode(content: str | list[Any]) -> list[int]:
        if len(str(content)) > _LONGEST_TOKEN * config.max_positions:
            raise InputError(
                f"A prompt of {len(str(content)):,} characters is longer than this model's context of "
                f"{config.max_positions} tokens; shorten the prompt."
            )
        if isinstance(content, str) and not files.chat:
            ids = tokenizer.encode(content)
        else:
            messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
            ids = encode_chat(tokenizer, messages)
        check_context(len(ids), wanted.max_new_tokens, config.max_positions)
        return ids

    given: list[Prompt] = []
    total = None
    if prompts is not None:
        # Only process 0 reads the file, and the others may not have it.
        total = count_file(prompts, encode) if first else None
        batches = share_batches(in_batches(read_file(prompts, encode), files.batch_size) if first else None)
    else:
        given = encode_texts(texts or [], encode)
        batches = in_batches(given, files.batch_size)
    # Of a pipe no more than the first lines can be checked now.
    batches = itertools.chain(list(itertools.islice(batches, 1)), batches)
    ids = [one.ids for one in given]
    # Processes may have the file of a grammar under different names.
    alike = dataclasses.replace(wanted, json_schema=None, grammar=None), grammar and grammar.source
    check_same("command", repr((ids, files.batch_size, alike, speculation.agreed, model.agreed, tokenizer.eos_ids)))
    # The file of the texts is made before the weights are read, so that it is not refused after.
    several = wanted.num_samples is not None
    with contextlib.ExitStack() as writing:
        if prompts is None:
            write = readable(len(given) == wanted.samples == 1)
        else:
            writing.enter_context(interrupts.answered())
            write = writing.enter_context(json_lines(output if first else None, files.overwrite, several))
        weights = load(path, model, mesh, strategy)
        speculate = speculating(model, mesh, strategy)
        seconds = time.perf_counter() - start
        loaded = ("loaded", f"in {seconds:.2f} s as {precision(weights)}")
        metrics = None if quiet else [loaded, *([("strategy", where)] if where else [])]
        if prompts is None and len(given) == 1 and wanted.plain:
            answer_one(
                weights, tokenizer, given[0], wanted, metrics, grammar, templated=files.chat, speculate=speculate
            )
        else:
            # A bar on the terminal on which lines are written would get between them.
            bar = prompts is not None and (output is not None or not sys.stdout.isatty())
            size = files.batch_size
            answer_all(weights, tokenizer, batches, wanted, size, metrics, write, grammar, total, bar, speculate)
