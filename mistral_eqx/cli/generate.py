"""`mistral-eqx generate`: what follows a prompt, or each of many."""

import contextlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import interrupts
from ..checks import Count, CountOrZero
from ..errors import InputError
from . import options, processes
from .options import within


if TYPE_CHECKING:
    from .prompts import Prompt


# No token has more characters. What a context of such tokens cannot hold is not encoded: that may take minutes.
_LONGEST_TOKEN = 1024


def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT", help="Texts to continue; '-', or nothing where stdin is piped, reads one from stdin."
        ),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Continue the prompts of a file, or of stdin if it is '-': on each line a JSON string, or an object "
            'with "prompt". Written is an object a line, with "text" added.',
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where --prompts writes; stdout unless given.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
    batch_size: Annotated[int, typer.Option(callback=within(Count), help="How many prompts are decoded together.")] = 8,
    max_new_tokens: options.MaxNewTokens = 64,
    min_new_tokens: Annotated[
        int | None,
        typer.Option(callback=within(CountOrZero), help="How many tokens to add before an end token may come."),
    ] = None,
    stop: options.Stop = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            callback=within(Count),
            help="How many texts each prompt gets: drawn ones, or with --num-beams the best ones. 1 unless given.",
        ),
    ] = None,
    num_beams: Annotated[
        int | None,
        typer.Option(callback=within(Count), help="Search for the likeliest text as a whole, with this many beams."),
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(
            callback=within(float), help="Above 0 a beam search favours long texts, below 0 short ones. 1 unless given."
        ),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            callback=within(CountOrZero),
            help="Show the logarithm of each token's probability, and those of this many likeliest ones.",
        ),
    ] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = 0,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(callback=within(Count), help="Read a prompt so many tokens at a time; fewer take less memory."),
    ] = None,
    dtype: options.LoadDType = None,
    mesh: options.Mesh = None,
    strategy: options.Strategy = None,
    coordinator: options.Coordinator = None,
    num_processes: options.NumProcesses = None,
    process_id: options.ProcessId = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the token that ends a text.")] = False,
    check: options.Check = False,
    debug: options.Debug = False,
):
    """Continue a prompt. Or several, or those of a file.

    The continuation goes to stdout as it is decoded, without the prompt; figures go to stderr. The likeliest token is
    taken each time unless --temperature, --top-k, --top-p, --min-p or --typical-p is given, or --num-beams. Several
    texts stand under headings.

    With --mesh the model is split over several devices, and with --coordinator over several processes, each started
    with the same command but for --process-id.
    """
    import mistral_eqx as mx

    from ..checkpoint import open_checkpoint
    from ..generation.reading import check_context
    from ..parallel.agreement import agree, share
    from .answering import answer_all, answer_one
    from .devices import Devices
    from .loading import load, locate, precision
    from .prompts import count_file, encode_texts, expect_file, in_batches, read_file, read_texts, share_batches
    from .texts import expect_output, json_lines, readable
    from .wanted import Wanted

    wanted = Wanted(
        max_new_tokens=max_new_tokens,
        seed=seed,
        ignore_eos=ignore_eos,
        stop=tuple(stop or ()),
        num_samples=num_samples,
        num_beams=num_beams,
        length_penalty=length_penalty,
        logprobs=logprobs,
        prefill_chunk=prefill_chunk,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_new_tokens=min_new_tokens,
    )
    wanted.check()
    arguments = prompt or []
    if prompts is not None and arguments:
        raise InputError("There are prompts as arguments and a file of --prompts; give one or the other.")
    if prompts is None and output is not None:
        raise InputError("--output is for the texts of --prompts; send those of other prompts on with '>'.")
    if output is None and overwrite:
        raise InputError("--overwrite replaces the file of --output, which is not given; leave it out.")
    alone = (coordinator, num_processes, process_id) == (None, None, None)
    # What is piped in reaches process 0, which has to know first that there are others.
    from_stdin = prompts is None and (not arguments or "-" in arguments)
    texts = read_texts(arguments) if prompts is None and (alone or not from_stdin) else None
    devices = Devices(mesh, strategy, coordinator, num_processes, process_id)
    first = processes.number() == 0
    if prompts is None and texts is None:
        texts = json.loads(share(json.dumps(read_texts(arguments)) if first else None))
    if prompts is not None and first:
        expect_file(prompts)
    path = locate(model)
    if prompts is not None and output is not None and first:
        expect_output(output, overwrite, prompts, path)
    start = time.perf_counter()
    # All that can be refused without the weights is refused before they are read.
    config = open_checkpoint(path).config
    wanted.check_vocabulary(config.vocab)
    placed, split, where = devices.place(config)
    tokenizer = mx.load_tokenizer(path)

    def encode(text: str) -> list[int]:
        if len(text) > _LONGEST_TOKEN * config.max_positions:
            raise InputError(
                f"A prompt of {len(text):,} characters is longer than this model's context of {config.max_positions} "
                "tokens; shorten the prompt."
            )
        ids = tokenizer.encode(text)
        check_context(len(ids), max_new_tokens, config.max_positions)
        return ids

    given: list[Prompt] = []
    total = None
    if prompts is not None:
        # Only process 0 reads the file, and the others may not have it.
        total = count_file(prompts, encode) if first else None
        batches = share_batches(in_batches(read_file(prompts, encode), batch_size) if first else None)
    else:
        given = encode_texts(texts or [], encode)
        batches = in_batches(given, batch_size)
    # Of a pipe no more than the first lines can be checked now.
    batches = itertools.chain(list(itertools.islice(batches, 1)), batches)
    agree("command", repr(([one.ids for one in given], batch_size, wanted, dtype, tokenizer.eos_ids)))
    # The file of the texts is made before the weights are read, so that it is not refused after.
    several = num_samples is not None
    with contextlib.ExitStack() as writing:
        if prompts is None:
            write = readable(len(given) == wanted.samples == 1)
        else:
            writing.enter_context(interrupts.answered())
            write = writing.enter_context(json_lines(output if first else None, overwrite, several))
        weights = load(path, dtype, check, placed, split)
        seconds = time.perf_counter() - start
        figures = [f"loaded in {seconds:.2f} s as {precision(weights)}", *([where] if where else [])]
        if prompts is None and len(given) == 1 and wanted.plain:
            answer_one(weights, tokenizer, given[0], wanted, figures)
        else:
            # A bar on the terminal on which lines are written would get between them.
            bar = prompts is not None and (output is not None or not sys.stdout.isatty())
            answer_all(weights, tokenizer, batches, wanted, batch_size, figures, write, total, bar)
