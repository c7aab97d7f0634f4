"""`mistral-eqx train`: runs a recipe, from its first step or from its last checkpoint."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import options, processes


if TYPE_CHECKING:
    from ..nn import Mistral, Stacked
    from .recipe import Recipe


@options.flat
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; examples/recipes has some.")],
    folder: Annotated[str | None, typer.Option(help="Folder of the run, in place of the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps, in place of the recipe's.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Override an entry of the recipe, such as data.rows=8."),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume a run even if its data or its random numbers have changed.")
    ] = False,
    *,
    devices: options.ProcessOptions,
    debug: options.Debug = False,
):
    """Train a model, or adapters, by a recipe.

    It begins with random weights or with a checkpoint.
    If the folder holds a run, the command resumes it, with the same numbers as an uninterrupted run. Ctrl-C and SIGTERM
    end it after the step, with a checkpoint. At the end the folder `model` holds the model, or `adapters` its adapters.

    The folder has metrics in training.csv and evaluation.csv; samples of the model go to stdout.
    """
    from .recipe import read_recipe

    changes = [
        *(change or []),
        *([f"folder={_quoted(folder)}"] if folder is not None else []),
        *([f"training.steps={steps}"] if steps is not None else []),
        *([f"devices.mesh={_quoted(devices.mesh)}"] if devices.mesh is not None else []),
        *([f"devices.strategy={_quoted(devices.strategy)}"] if devices.strategy is not None else []),
    ]
    wanted = read_recipe(recipe, changes)
    _run(wanted, recipe.parent, allow_changes, dataclasses.replace(devices, **dataclasses.asdict(wanted.devices)))


def _quoted(text: str) -> str:
    """A text in TOML, whose escapes JSON's are."""
    return json.dumps(text, ensure_ascii=False)


def _run(
    recipe: "Recipe",
    near: Path,
    allow_changes: bool,
    wanted: options.ProcessOptions,
):
    import mistral_eqx as mx

    from ..checkpoint import open_checkpoint
    from ..parallel import check_same
    from .announce import Announce
    from .devices import Devices
    from .loading import locate
    from .training import continuations, count_solved, make_trainer, open_sets, share_of_rows

    devices = Devices(wanted)
    check_same("recipe", repr(recipe))
    recipe.check()
    path = locate(recipe.model.name) if recipe.model.weights else None
    config = _config(recipe) if path is None else open_checkpoint(path).config
    place = path if recipe.data.tokenizer is None else locate(recipe.data.tokenizer)
    tokenizer = None if place is None else mx.load_tokenizer(place)
    eos_ids = () if tokenizer is None else tuple(tokenizer.eos_ids)
    if path is None and tokenizer is not None:
        config = _with_vocab(recipe, config, tokenizer.vocab)
        config = dataclasses.replace(config, bos_id=tokenizer.bos_id, eos_ids=eos_ids)
    sets = open_sets(recipe.data, near, Path(recipe.folder) / "tokens", tokenizer, config.vocab)
    if path is None and sets.vocab is not None:
        config = _with_vocab(recipe, config, sets.vocab)
    if sets.seq > config.max_positions:
        raise InputError(
            f"The recipe's 'data.seq' is {sets.seq}, and the model's context is {config.max_positions} tokens; make "
            "the rows shorter.",
            key="data.seq",
        )
    placed, split, where = devices.place(config)
    shard = share_of_rows(placed, split)
    show = continuations(sets, recipe.training.samples, eos_ids)
    announce = Announce()
    trainer = make_trainer(recipe, sets, show, shard, allow_changes, announce)
    # The call that trains takes the model out of the list, so that memory need not hold it any longer.
    given = [_model(recipe, config, path, placed, split)]
    batches = mx.train.batches(
        sets.known,
        rows=recipe.data.rows,
        seq=sets.seq,
        objective=sets.objective,
        seed=recipe.data.seed,
        packing=recipe.data.packing,
        shard=shard,
    )
    processes.say(
        f"{config.parameters:,} weights, {recipe.training.steps} steps of {recipe.data.rows} rows of {sets.seq} "
        f"tokens{', ' + where if where else ''}"
    )
    try:
        trained = trainer.fit_state(given.pop(), batches, steps=recipe.training.steps).model
    except (KeyboardInterrupt, SystemExit) as ended:
        processes.say(f"Interrupted after step {announce.step}; the same command continues from there.")
        raise typer.Exit(getattr(ended, "code", 130)) from None
    target = _save(recipe, trained, tokenizer)
    _tell(Path(recipe.folder))
    processes.say(f"Saved to {target}")
    if tokenizer is not None:
        use = f"{recipe.model.name} --adapter {target}" if recipe.lora is not None else target
        processes.say(f"To use it: mistral-eqx generate --model {use} 'PROMPT'")
    if isinstance(sets.held_out, mx.train.data.AbstractProblems):
        processes.tell(count_solved(mx.nn.unstack(trained), sets.held_out))


def _config(recipe: "Recipe") -> Any:
    from ..checks import CountOrZero, kinds_of
    from ..presets import PRESETS
    from .recipe import entry_of

    if recipe.model.name not in PRESETS:
        raise InputError(
            f"The recipe's 'model.name' is {recipe.model.name!r}; without 'model.weights' it must be a preset: "
            f"{', '.join(PRESETS)}."
        )
    config, changes = PRESETS[recipe.model.name], dict(recipe.model.config)
    kinds = {**kinds_of(type(config)), "windows": list[CountOrZero]}
    for name, value in changes.items():
        # These two belong to a tokenizer.
        if name not in kinds or name in ("bos_id", "eos_ids"):
            own = ", ".join(name for name in kinds if name not in ("bos_id", "eos_ids"))
            raise InputError(f"The recipe's 'model.config' has {name!r}, which cannot be set; it may have {own}.")
        changes[name] = entry_of(value, kinds[name], f"model.config.{name}")
    if "windows" in changes:
        changes["windows"] = tuple(window or None for window in changes["windows"])
    elif "layers" in changes:
        changes["windows"] = (None,) * changes["layers"]
    try:
        return dataclasses.replace(config, **changes)
    except InputError as error:
        name = "model.config" + (f".{error.key}" if error.key else "")
        raise InputError(f"The recipe's {name!r} makes no model: {error}", key=name) from error


def _with_vocab(recipe: "Recipe", config: Any, vocab: int) -> Any:
    """A config with the vocabulary of the data, or the larger one that the recipe asks for."""
    wanted = recipe.model.config.get("vocab", vocab)
    if wanted < vocab:
        raise InputError(
            f"The recipe's 'model.config' has a vocab of {wanted}, and the data {vocab} tokens; make it at least that, "
            "or leave it out."
        )
    return dataclasses.replace(config, vocab=wanted)


def _model(recipe: "Recipe", config: Any, path: Path | None, placed: Any, split: Any) -> "Mistral | Stacked":
    import equinox as eqx
    import jax.random as jr

    import mistral_eqx as mx

    from .loading import load, load_stacked
    from .options import DType, ModelOptions

    key, adapters = jr.split(jr.key(recipe.model.seed))
    stages, split, wanted = split, split.without("layers"), ModelOptions(dtype=DType.FLOAT32)
    if path is not None and stages != split and recipe.lora is None:
        return load_stacked(path, wanted, placed, stages)
    if path is not None:
        model = load(path, wanted, placed, split)
    else:
        model = eqx.filter_jit(mx.Mistral.init)(config, key=key)
        model = model if placed is None else mx.shard(model, placed, split)
    if recipe.lora is not None:
        lora = recipe.lora
        model = mx.apply_lora(
            model,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=tuple(lora.targets),
            dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            train_embeddings=lora.train_embeddings,
            key=adapters,
        )
    return model if placed is None or stages == split else mx.shard(mx.nn.stack(model), placed, stages)


def _tell(folder: Path):
    """Prints the last line of each file of metrics."""
    import csv

    for name in ("training", "evaluation"):
        path = folder / f"{name}.csv"
        if path.exists() and processes.number() == 0:
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    lines = list(csv.DictReader(file))
                for last in lines[-1:]:
                    values = ", ".join(f"{what} {float(last[what]):.4g}" for what in ("loss", "accuracy"))
                    processes.say(f"{name}: step {last['step']}, {values}")
            except (OSError, ValueError, KeyError, TypeError, csv.Error):
                processes.say(f"{path} holds no metrics; the model is not affected.")


def _save(recipe: "Recipe", model: "Stacked", tokenizer: Any) -> Path:
    import mistral_eqx as mx

    _expect_finite(recipe, model)
    if recipe.lora is not None and not recipe.lora.train_embeddings:
        target = Path(recipe.folder) / "adapters"
        mx.save_lora(mx.nn.unstack(model), target, base=recipe.model.name, overwrite=True)
    else:
        target = Path(recipe.folder) / "model"
        whole = model if recipe.lora is None else mx.merge_lora(mx.nn.unstack(model))
        mx.save(whole, target, overwrite=True, finish=None if tokenizer is None else tokenizer.save)
    return target


def _expect_finite(recipe: "Recipe", model: "Stacked"):
    """**Raises:** `InputError` if a weight is NaN or infinite; nothing is written then."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    def all_finite(arrays: Any) -> Any:
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(arrays)]))

    # One program over all weights: of several processes each gets the same answer.
    if not jax.jit(all_finite)(eqx.filter(model, eqx.is_inexact_array)):
        raise InputError(
            f"The trained model has weights that are NaN or infinite, so it is not saved to {recipe.folder!r}; train "
            "again in another folder, with a smaller optimizer.learning_rate.",
            file=recipe.folder,
            key="optimizer.learning_rate",
        )
