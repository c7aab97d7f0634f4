"""`mistral-eqx generate`: a prompt's continuation."""

import sys
import time
from typing import Annotated

import typer

from . import options, processes


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; '-', or nothing where stdin is piped, reads stdin.")
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
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
    """Continue a prompt.

    The continuation goes to stdout as it is decoded, without the prompt; figures go to stderr. The likeliest token is
    taken each time unless --temperature, --top-k or --top-p is given.

    With --mesh the model is split over several devices, and with --coordinator over several processes, each started
    with the same command but for --process-id.
    """
    import jax.random as jr

    import mistral_eqx as mx

    from ..checkpoint import open_checkpoint
    from ..generate.loop import check_context
    from ..parallel.agreement import agree, share
    from ..text import Detokenizer
    from .devices import Devices
    from .loading import load, locate, precision
    from .report import Stopwatch

    sampler = mx.Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    alone = (coordinator, num_processes, process_id) == (None, None, None)
    # What is piped in reaches process 0, which has to know first that there are others.
    text = _read_prompt(prompt) if alone or prompt not in (None, "-") else None
    devices = Devices(mesh, strategy, coordinator, num_processes, process_id)
    if text is None:
        text = share(_read_prompt(prompt) if processes.number() == 0 else None)
    path = locate(model)
    start = time.perf_counter()
    # All that can be refused without the weights is refused before they are read.
    config = open_checkpoint(path).config
    placed, split, where = devices.place(config)
    tokenizer = mx.load_tokenizer(path)
    ids = tokenizer.encode(text)
    check_context(len(ids), max_new_tokens, config.max_positions)
    agree("command", repr((ids, max_new_tokens, temperature, top_k, top_p, seed, dtype, ignore_eos, tokenizer.eos_ids)))
    weights = load(path, dtype, check, placed, split)
    loaded = [f"loaded in {time.perf_counter() - start:.2f} s as {precision(weights)}", *([where] if where else [])]

    detokenizer = Detokenizer(tokenizer)
    stopwatch = Stopwatch(len(ids))
    interrupted = False
    tokens = mx.stream(
        weights,
        [ids],
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        eos_id=None if ignore_eos else tokenizer.eos_ids,
        key=jr.key(seed),
    )
    try:
        for (token,) in tokens:
            stopwatch.tick()
            _write(detokenizer.push(int(token)))
    except KeyboardInterrupt:
        interrupted = True
    _write(detokenizer.flush() + "\n")
    processes.say(stopwatch.line(*loaded))
    if interrupted:
        raise typer.Exit(130)


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise ValueError("There is no prompt; give one as an argument, or pipe it in.")
    if prompt is None or prompt == "-":
        try:
            # The newline at the end is the pipe's or the editor's, hardly ever meant.
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"The prompt on stdin is not {error.encoding.upper()} text: {error.reason}.") from error
    if not prompt:
        raise ValueError("The prompt is empty; give some text to continue.")
    return prompt


def _write(text: str):
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
