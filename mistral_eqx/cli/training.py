"""From a recipe to what a run of training is made of."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import kinds_of
from ..documents import read_text, to_path
from ..errors import InputError
from . import processes
from .recipe import MADE, Data, Optimizer, Recipe, entry_of


if TYPE_CHECKING:
    import numpy as np
    import optax
    from jax.sharding import Mesh

    import mistral_eqx as mx

    from ..nn import Mistral
    from ..parallel import Strategy
    from ..text import AbstractTokenizer


class Sets(NamedTuple):
    """What is learned from.

    **Attributes:**

    - `known`, `held_out`: the examples to train on and those to evaluate on, or what an objective makes them of.
    - `objective`: makes an example of an entry, or `None` if entries are examples.
    - `seq`: how many columns a row has.
    - `vocab`: how many tokens there are, or `None` if that is the model's affair.
    - `encode`, `decode`: between texts and tokens, or `None` if there are no texts.
    """

    known: Any
    held_out: Any
    objective: Callable[[Any, np.random.Generator], mx.train.Example] | None
    seq: int
    vocab: int | None = None
    encode: Callable[[str], list[int]] | None = None
    decode: Callable[[Any], str] | None = None


def share_of_rows(mesh: Mesh | None, strategy: Strategy) -> tuple[int, int]:
    """Which part of a batch's rows this process gives, and of how many: those of its devices.

    Processes whose devices share rows give the same ones.
    """
    import jax
    from jax.sharding import NamedSharding

    if mesh is None or not processes.several():
        return 0, 1
    parts = strategy.parts("batch", mesh)
    rows: dict[int, set[int]] = {}
    for device, (part,) in NamedSharding(mesh, strategy.spec("batch")).devices_indices_map((parts,)).items():
        rows.setdefault(device.process_index, set()).add(part.start or 0)
    shares = sorted({min(own) for own in rows.values()})
    return shares.index(min(rows[jax.process_index()])), len(shares)


def open_sets(data: Data, near: Path, tokens: Path, tokenizer: AbstractTokenizer | None, vocab: int) -> Sets:
    """Opens the data of a recipe.

    **Arguments:**

    - `data`: the recipe's.
    - `near`: the folder from which paths are.
    - `tokens`: the folder for tokens of texts.
    - `tokenizer`: for texts.
    - `vocab`: of the model, for texts.

    **Raises:** `ValueError` if an entry is missing or does not fit the kind.
    """
    from ..train import data as sets
    from ..train.data.texts import one_kind_of_line_end

    if data.kind in MADE:
        kind = {"sort": sets.Sort, "adder": sets.Adder}[data.kind]
        options = _checked(kind, data.options, "data.options", given=("held_out",))
        known, held_out = (kind(**options, held_out=part) for part in (False, True))
        return Sets(known, held_out, None, data.seq or known.seq, known.vocab)
    if data.seq is None:
        raise InputError(f"The recipe lacks 'data.seq', how many columns a row has, for data of kind {data.kind!r}.")
    if data.path is None:
        raise InputError(f"The recipe lacks 'data.path', the file to read, for data of kind {data.kind!r}.")
    if data.kind == "characters":
        text = "".join(one_kind_of_line_end(read_text(path, 2**30)) for path in _paths(data.path, near))
        known, held_out = (sets.Characters(text, data.seq, held_out=part) for part in (False, True))
        return Sets(known, held_out, None, data.seq, known.vocab, known.encode, known.decode)
    if tokenizer is None:
        raise InputError(
            f"Data of kind {data.kind!r} takes a tokenizer, which a preset lacks; name one as 'data.tokenizer'."
        )
    objective, piece = _objective(data, tokenizer, vocab)
    known = _entries(data, data.path, near, tokens, tokenizer, vocab, piece, objective)
    held_out = (
        None
        if data.held_out is None
        else _entries(data, data.held_out, near, tokens, tokenizer, vocab, piece, objective)
    )
    return Sets(known, held_out, objective, data.seq, None, tokenizer.encode, tokenizer.decode)


def _entries(
    data: Data,
    path: str | list[str],
    near: Path,
    tokens: Path,
    tokenizer: AbstractTokenizer,
    vocab: int,
    piece: int,
    objective: Any,
) -> Any:
    from ..train import data as sets
    from .progress import progress_bar

    paths = _paths(path, near)
    match data.kind:
        case "chat":
            assert data.seq is not None
            rows = sets.JSONLines(paths, field=data.field or "messages")
            with progress_bar("Reading chats", counts=True) as bar:
                usable = sets.Usable(
                    rows, functools.partial(_fits, objective, data.seq), on_bad_row=data.on_bad_row, progress=bar
                )
            _say_skipped(usable.skipped)
            return usable
        case "json_lines":
            texts = sets.JSONLines(paths, field=data.field or "text")
        case "parquet":
            texts = sets.Parquet(paths, column=data.field or "text")
        case _:
            texts = sets.TextFile(paths, separator=data.separator)
    end_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    with progress_bar("Encoding texts", counts=True) as bar:
        encoded = sets.tokenise(
            texts,
            tokenizer.encode,
            tokens,
            vocab=vocab,
            end_id=end_id,
            on_bad_row=data.on_bad_row,
            progress=bar,
        )
    _say_skipped(encoded.skipped)
    return sets.Pieces(encoded, piece)


def _fits(objective: Callable[[Any, Any], mx.train.Example], seq: int, messages: Any):
    length = len(objective(messages, None).inputs)
    if length > seq:
        raise InputError(f"it has {length} tokens, which do not fit into a row of {seq}; make 'data.seq' larger.")


def _say_skipped(skipped: list[str]):
    if skipped:
        from ..train.data.usable import describe_skipped

        processes.say(describe_skipped(skipped))


def _objective(
    data: Data, tokenizer: AbstractTokenizer, vocab: int
) -> tuple[Callable[[Any, np.random.Generator], mx.train.Example], int]:
    """The objective, and how long a piece may be so that its example has at most `seq` columns."""
    import numpy as np

    import mistral_eqx as mx

    from .. import train

    assert data.seq is not None
    seq, options = data.seq, data.objective_options
    if data.kind == "chat":
        encode = functools.partial(mx.encode_chat, tokenizer)
        return lambda messages, random: train.chat(messages, encode), seq
    # How long a piece may be, which has one token more than its length.
    lengths = {
        "causal": seq,
        "prefix_lm": seq,
        "bert_mask": seq - 1,
        "mass": (2 * seq) // 3 - 2,
        "replace_spans": int(seq / 1.3) - 3,
        "drop_spans": seq - 1,
    }
    if data.objective not in lengths:
        raise InputError(
            f"The recipe's 'data.objective' is {data.objective!r}; it must be one of {', '.join(lengths)}, or the kind "
            "of the data 'chat'."
        )
    if lengths[data.objective] < 1:
        raise InputError(f"Rows of {seq} columns are too short for the objective {data.objective!r}; make them longer.")
    function = getattr(train, data.objective)
    known = {"vocab": vocab} if "vocab" in inspect.signature(function).parameters else {}
    options = {**known, **_checked(function, options, "data.objective_options", given=tuple(known))}
    for name in ("mask_id", "sentinels"):
        if name in options and (largest := max(np.atleast_1d(options[name]).tolist(), default=0)) >= vocab:
            entry = f"data.objective_options.{name}"
            raise InputError(
                f"The recipe's {entry!r} has the token id {largest}, but the vocabulary has {vocab} tokens; give ids "
                "below that.",
                key=entry,
            )
    match data.objective:
        case "causal":
            return lambda ids, random: train.causal(ids), seq
        case "prefix_lm":
            return lambda ids, random: train.prefix_lm(ids, random.integers(1, len(ids))), seq
    return lambda ids, random: function(ids, random, **options), lengths[data.objective]


def _checked(
    function: Callable[..., Any], options: Mapping[str, Any], where: str, *, given: tuple[str, ...]
) -> dict[str, Any]:
    """Options of a recipe, if a function takes them as they are; what is `given` otherwise is none of them."""
    takes = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in given and (parameter.kind is parameter.KEYWORD_ONLY or inspect.isclass(function))
    }
    for name in options:
        if name not in takes:
            may = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise InputError(f"The recipe's {where!r} have {name!r}, which is not taken there; {may}.")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in options:
            raise InputError(f"The recipe's {where!r} lack {name!r}; add it.")
    kinds = kinds_of(function.__init__ if inspect.isclass(function) else function)
    return {name: entry_of(value, kinds[name], f"{where}.{name}") for name, value in options.items()}


def _paths(path: str | list[str], near: Path) -> list[Path]:
    paths = [near / to_path(one, "The recipe's 'data.path'") for one in ([path] if isinstance(path, str) else path)]
    for one in paths:
        if not one.is_file():
            raise InputError(f"There is no file {str(one)!r}, which the recipe names; check the path.")
    return paths


def make_optimizer(optimizer: Optimizer, steps: int) -> optax.GradientTransformation:
    """The recipe's optimizer for so many steps."""
    from .. import train

    match optimizer.schedule:
        case "constant":
            rate = optimizer.learning_rate
        case "cosine":
            rate = train.warmup_cosine(optimizer.learning_rate, warmup=optimizer.warmup, steps=steps, end=optimizer.end)
        case _:
            decay = max(1, steps // 10) if optimizer.decay is None else optimizer.decay
            rate = train.wsd(
                optimizer.learning_rate, warmup=optimizer.warmup, decay=decay, steps=steps, end=optimizer.end
            )
    return train.adamw(rate, weight_decay=optimizer.weight_decay, b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps)


def make_trainer(
    recipe: Recipe,
    sets: Sets,
    show: Callable[[Mistral], object] | None,
    shard: tuple[int, int],
    allow_changes: bool = False,
    *more: mx.train.Callback,
) -> mx.Trainer:
    """The recipe's trainer, with its callbacks and `more`; it evaluates on this process's share of rows."""
    from .. import train

    wanted = recipe.training
    callbacks = [
        *more,
        *([train.KeepBest()] if wanted.keep_best else []),
        *([train.EarlyStop(wanted.early_stop)] if wanted.early_stop is not None else []),
        *([train.TensorBoard()] if wanted.tensorboard else []),
        *([train.WandB(wanted.wandb, dir=recipe.folder)] if wanted.wandb is not None else []),
        *([train.Samples(show, every=wanted.evaluate_every)] if show is not None else []),
    ]
    if sets.held_out is None and (wanted.keep_best or wanted.early_stop is not None):
        raise InputError(
            "The recipe has nothing to evaluate on, which 'keep_best' and 'early_stop' go by; add 'data.held_out'."
        )
    evaluate_on = None
    if sets.held_out is not None:
        evaluate_on = train.batches(
            sets.held_out,
            rows=recipe.data.rows,
            seq=sets.seq,
            objective=sets.objective,
            shuffle=False,
            epochs=1,
            remainder="pad",
            shard=shard,
        )
    settings = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(wanted)}
    options = {name: settings[name] for name in _OF_TRAINER}
    options["clip"] = wanted.clip or None
    options["compute_dtype"] = None if wanted.compute_dtype == wanted.dtype else wanted.compute_dtype
    return train.Trainer(
        make_optimizer(recipe.optimizer, wanted.steps),
        checkpoint_dir=recipe.folder,
        evaluate_on=evaluate_on,
        callbacks=callbacks,
        allow_changes=allow_changes,
        **options,
    )


_OF_TRAINER = (
    "accumulate",
    "clip",
    "remat",
    "label_smoothing",
    "z_loss",
    "balance_loss",
    "router_z_loss",
    "capacity",
    "zero",
    "offload",
    "dtype",
    "seed",
    "schedule",
    "save_every",
    "keep",
    "evaluate_every",
    "log_every",
)


def continuations(sets: Sets, samples: list[str], eos_ids: tuple[int, ...]) -> Callable[[Mistral], object] | None:
    """Prints how a model continues some texts."""
    if not samples or sets.encode is None or sets.decode is None:
        return None
    import mistral_eqx as mx

    prompts, decode = [sets.encode(sample) for sample in samples], sets.decode

    def show(model: Mistral):
        out = mx.generate(model, prompts, max_new_tokens=64, eos_id=eos_ids)
        for prompt, tokens, length in zip(prompts, out.tokens.tolist(), out.lengths.tolist(), strict=True):
            # All of it at once: the first word of a text would lose its space.
            _say(decode([*prompt, *tokens[:length]]))

    return show


def count_solved(model: Mistral, held_out: Any) -> str:
    """How many of the problems that were held out a model solves, in a sentence."""
    import jax.numpy as jnp

    import mistral_eqx as mx

    prompts, answers = held_out.prompts, held_out.answers
    out = mx.generate(model, prompts, max_new_tokens=answers.shape[1], eos_id=())
    right = int((out.tokens == jnp.asarray(answers)).all(axis=1).sum())
    return f"{right} of {len(answers)} held-out problems are solved"


def _say(line: str):
    processes.tell(line)
