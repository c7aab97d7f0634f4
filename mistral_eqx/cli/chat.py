"""`mistral-eqx chat`: turns of a conversation that the model remembers."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from . import options


def chat(
    model: options.Model = options.DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    dtype: options.LoadDType = None,
    check: options.Check = False,
    debug: options.Debug = False,
):
    """Talk with a model, turn by turn.

    On a terminal it asks for each turn; ctrl-C stops a reply. Where stdin is piped, each line is a turn and the replies
    go to stdout. /reset forgets the conversation, /exit or the end of the input leaves.
    """
    import jax.random as jr

    import mistral_eqx as mx

    from ..checkpoint import open_checkpoint
    from ..generate import Conversation
    from ..text import Detokenizer, encode_chat
    from .loading import load, locate
    from .report import Stopwatch

    sampler = mx.Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    path = locate(model)
    # All that can be refused without the weights is refused before they are read.
    open_checkpoint(path)
    tokenizer = mx.load_tokenizer(path)
    opening = [] if system is None else [{"role": "system", "content": system}]
    encode_chat(tokenizer, [*opening, {"role": "user", "content": "?"}])
    weights = load(path, dtype, check)
    interactive = sys.stdin.isatty()
    if interactive:
        typer.echo("/reset forgets the conversation, /exit leaves, ctrl-C stops a reply.", err=True)

    conversation, messages, turn = Conversation(weights), list(opening), 0
    for text in _turns(interactive):
        if text == "/reset":
            conversation, messages = Conversation(weights), list(opening)
            continue
        if text == "/exit":
            break
        ids = encode_chat(tokenizer, [*messages, {"role": "user", "content": text}])
        room = weights.config.max_positions - len(ids)
        if room < 1:
            full = f"The conversation fills the model's context of {weights.config.max_positions} tokens"
            if not interactive:
                raise ValueError(f"{full}; put /reset on a line before the next turn.")
            typer.echo(f"{full}; /reset starts anew.", err=True)
            continue
        stopwatch, detokenizer, reply, interrupted = Stopwatch(len(ids)), Detokenizer(tokenizer), [], False
        tokens = conversation.reply(
            ids,
            max_new_tokens=min(max_new_tokens, room),
            sampler=sampler,
            eos_id=tokenizer.eos_ids,
            key=jr.fold_in(jr.key(seed), turn),
        )
        try:
            for token in tokens:
                stopwatch.tick()
                reply.append(detokenizer.push(token))
                _write(reply[-1])
        except KeyboardInterrupt:
            interrupted = True
        reply.append(detokenizer.flush())
        _write(reply[-1] + "\n")
        if interactive:
            typer.echo(stopwatch.line(), err=True)
        elif interrupted:
            raise typer.Exit(130)
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(reply)}]
        turn += 1


def _turns(interactive: bool) -> Iterator[str]:
    """What the user says, turn by turn, without empty ones."""
    for line in _asked() if interactive else sys.stdin:
        if line.strip():
            yield line.strip()


def _asked() -> Iterator[str]:
    from rich.console import Console

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and an editable line)
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


def _write(text: str):
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
