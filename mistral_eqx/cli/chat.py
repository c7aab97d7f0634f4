"""`mistral-eqx chat`: a conversation, turn by turn."""

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from .. import interrupts
from ..errors import InputError
from . import options, processes
from .background import Background


# One word behind a slash; a path has more slashes, and is for the model.
_COMMAND = re.compile(r"/\w+")


@options.flat
def chat(
    *,
    model: options.ModelOptions,
    system: Annotated[str | None, typer.Option(help="Instructions to the model before the conversation.")] = None,
    max_new_tokens: options.MaxNewTokens = 512,
    stop: options.Stop = None,
    cache_dtype: options.CacheDType = None,
    sampling: options.SamplingOptions,
    speculation: options.SpeculationOptions,
    seed: options.Seed = 0,
    split: options.ProcessOptions,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
):
    """Talk with a model, turn by turn.

    On a terminal it asks for each turn; ctrl-C stops a reply. Where stdin is piped, each line is a turn and the replies
    go to stdout. /reset forgets the conversation, /exit or the end of the input leaves.

    With --mesh the model is split over several devices, and with --coordinator over several processes, each started
    with the same command but for --process-id. Turns are read by process 0, and ctrl-C then ends them all.
    """
    import jax.random as jr

    import mistral_eqx as mx

    from ..checkpoint import open_checkpoint
    from ..generation import Conversation
    from ..parallel.agreement import broadcast, check_same
    from ..text import encode_chat
    from ..text.stops import checked_stops
    from .devices import Devices
    from .loading import Speculating, load, locate
    from .progress import waiting
    from .replies import ShownReply, as_message
    from .report import Stopwatch

    sampler, stops = sampling.sampler(), checked_stops(stop or ())
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    devices = Devices(split)
    model.check_adapter()
    path = locate(model.model)
    # All that can be refused without the weights is refused before they are read.
    config = open_checkpoint(path).config
    speculating = Speculating(speculation, config.vocab)
    mesh, strategy, where = devices.place(config)
    speculating.check(mesh, strategy)
    tokenizer = mx.load_tokenizer(path)
    opening = [] if system is None else [{"role": "system", "content": system}]
    first = encode_chat(tokenizer, [*opening, {"role": "user", "content": "?"}])
    settings = sampling, stops, cache_dtype, seed, speculation.agreed, model.agreed
    check_same("command", repr((first, max_new_tokens, settings, tokenizer.eos_ids)))
    weights = load(path, model, mesh, strategy)
    speculate = speculating(model, mesh, strategy)
    interactive = broadcast("terminal" if sys.stdin.isatty() else "pipe") == "terminal"
    interrupting = "leaves as well" if processes.several() else "stops a reply"
    commands = f"/reset forgets the conversation, /exit leaves, /help shows this line, ctrl-C {interrupting}."
    if interactive:
        if where:
            processes.say(f"The model is split over devices: {where}.")
        processes.say(commands)

    begin = functools.partial(Conversation, weights, cache_dtype=cache_dtype, speculate=speculate)
    conversation, messages, turn = begin(), list(opening), 0
    for text in _shared_turns(interactive):
        if text == "/reset":
            conversation, messages = begin(), list(opening)
            if interactive:
                processes.say("The conversation starts anew.")
            continue
        if text == "/exit":
            break
        if interactive and _COMMAND.fullmatch(text):
            processes.say(commands if text == "/help" else f"There is no command {text}: {commands}")
            continue
        ids = encode_chat(tokenizer, [*messages, {"role": "user", "content": text}])
        room = weights.config.max_positions - len(ids)
        if room < 1:
            full = f"The conversation fills the model's context of {weights.config.max_positions} tokens"
            if not interactive:
                raise InputError(f"{full}; put /reset on a line before the next turn.")
            processes.say(f"{full}; /reset starts anew.")
            continue
        stopwatch, reply, interrupted = Stopwatch(), [], False
        said = mx.StopText(tokenizer, stops, skip_special=False, after=ids)
        parser, shown = mx.ReplyParser(tokenizer, after=ids), ShownReply()
        reply_to = functools.partial(
            conversation.reply,
            ids,
            max_new_tokens=min(max_new_tokens, room),
            sampler=sampler,
            eos_id=tokenizer.eos_ids,
            key=jr.fold_in(jr.key(seed), turn),
            stop=stops,
            tokenizer=tokenizer,
        )
        tokens = Background(reply_to)
        try:
            with waiting(f"Reading {len(ids):,} tokens") as read:
                for token in tokens:
                    read()
                    stopwatch.tick()
                    reply.append(parser.push(said.push(token)))
                    shown.add(reply[-1])
        except KeyboardInterrupt:
            # The other processes do not know of the signal, and continue.
            if processes.several():
                raise
            interrupted = True
            if interactive:
                # The model can read the next turn when this token is done.
                tokens.stop()
                interrupts.forgive()
        reply += [parser.push(said.flush()), parser.flush()]
        shown.add(mx.Reply.join(reply[-2:]))
        shown.end()
        if interactive:
            if not quiet:
                processes.say(", ".join(f"{name} {value}" for name, value in stopwatch.metrics()))
        elif interrupted:
            raise KeyboardInterrupt
        messages += [{"role": "user", "content": text}, as_message(tokenizer, mx.Reply.join(reply))]
        turn += 1


def _shared_turns(interactive: bool) -> Iterator[str]:
    """The turns, on all processes; process 0 reads them."""
    from ..parallel.agreement import broadcast

    if processes.number() > 0:
        while (text := broadcast(None)) is not None:
            yield text
        return
    for text in _turns(interactive):
        yield broadcast(text)
    broadcast(None)


def _turns(interactive: bool) -> Iterator[str]:
    """What the user says, turn by turn, without empty ones."""
    for line in _asked() if interactive else sys.stdin:
        if line.strip():
            yield line.strip()


def _asked() -> Iterator[str]:
    from rich.console import Console

    with contextlib.suppress(ImportError):
        import readline  # gives input() a history and an editable line

        # Python turns this off; without it each line of a pasted text would be a turn.
        readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            if sys.stdout.isatty():
                yield input("\001\033[1m\002> \001\033[0m\002")
            else:
                yield Console(stderr=True).input("[bold]>[/] ")
        except EOFError:
            typer.echo(err=True)
            return
        except KeyboardInterrupt:
            typer.echo(err=True)
            raise
