"""The recipe of `mistral-eqx train`: a TOML file, and options that override its entries."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..checks import Count, CountOrZero, NotNegative, Positive, Seed, ShareBelowOne, checked, kinds_of
from ..documents import read_toml, shown
from ..errors import InputError


@dataclasses.dataclass(frozen=True)
class Model:
    """**Attributes:**

    - `name`: of a preset, whose shapes get random weights; or with `weights` a checkpoint, as of `--model`.
    - `weights`: whether training begins with the weights of a checkpoint.
    - `config`: entries of a preset's config that are other, such as `layers`. The vocabulary is that of the data or
        the tokenizer, unless a larger `vocab` is given; a window of 0 is none.
    - `seed`: of random weights, and of those of adapters.
    """

    name: str
    weights: bool = False
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class Data:
    """**Attributes:**

    - `kind`: `"sort"`, `"adder"`, `"characters"`, `"text"`, `"json_lines"`, `"parquet"` or `"chat"`.
    - `path`: a file, or several, found from where the recipe is.
    - `held_out`: a file, or several, of the same kind, to evaluate on. Sets that are made hold out a part themselves.
    - `field`: of JSON lines or Parquet.
    - `separator`: between the documents of a text.
    - `tokenizer`: as of a checkpoint; the model's own unless given.
    - `on_bad_row`: what becomes of a row that cannot be used: `"refuse"` before training begins, or `"skip"`.
    - `options`: of the set that is made, such as `digits`.
    - `seq`, `rows`, `packing`, `seed`: as of [`mistral_eqx.train.data.batches`][].
    - `objective`: the name of one in `mistral_eqx.train`, and `objective_options` what it takes.
    """

    kind: Literal["sort", "adder", "characters", "text", "json_lines", "parquet", "chat"]
    rows: Count
    path: str | list[str] | None = None
    held_out: str | list[str] | None = None
    field: str | None = None
    separator: str | None = None
    tokenizer: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    seq: Count | None = None
    packing: bool = False
    seed: Seed = 0
    objective: str = "causal"
    objective_options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """**Attributes:** as of [`mistral_eqx.train.adamw`][], and

    - `schedule`: `"constant"`, `"cosine"` or `"wsd"`, with `warmup`, `decay` and `end`.
    """

    learning_rate: Positive
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup: CountOrZero = 0
    decay: Count | None = None
    end: NotNegative = 0.0
    weight_decay: NotNegative = 0.1
    b1: ShareBelowOne = 0.9
    b2: ShareBelowOne = 0.95
    eps: Positive = 1e-8


@dataclasses.dataclass(frozen=True)
class Training:
    """**Attributes:** as of [`mistral_eqx.Trainer`][], and

    - `steps`: how many.
    - `clip`: 0 for no clipping.
    - `early_stop`: after how many evaluations without a new best the run ends.
    - `keep_best`: whether the best model so far is kept.
    - `samples`: texts that are continued at each evaluation.
    - `tensorboard`: whether metrics go there; `wandb`: the project that they go to.
    """

    steps: Count
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    accumulate: Count = 1
    clip: NotNegative = 1.0
    remat: Literal["none", "dots", "block"] = "block"
    label_smoothing: ShareBelowOne = 0.0
    z_loss: NotNegative = 0.0
    balance_loss: NotNegative = 0.0
    router_z_loss: NotNegative = 0.0
    capacity: Positive | None = None
    zero: Literal[0, 1, 2, 3] = 0
    offload: bool | Literal["disk"] = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0
    schedule: Literal["gpipe", "1f1b"] = "gpipe"
    save_every: Count = 500
    keep: Count = 2
    evaluate_every: Count = 500
    log_every: Count = 10
    early_stop: Count | None = None
    keep_best: bool = False
    samples: list[str] = dataclasses.field(default_factory=list)
    tensorboard: bool = False
    wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class LoRA:
    """**Attributes:** as of [`mistral_eqx.apply_lora`][]."""

    rank: Count
    alpha: Positive
    targets: list[str] = dataclasses.field(default_factory=lambda: ["q_proj", "v_proj"])
    dropout: ShareBelowOne = 0.0
    use_rslora: bool = False
    train_embeddings: bool = False


@dataclasses.dataclass(frozen=True)
class Devices:
    """**Attributes:** as of the options `--mesh` and `--strategy`."""

    mesh: str | None = None
    strategy: str | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """**Attributes:**

    - `folder`: what the run writes goes there: checkpoints, metrics, and at the end the model.
    - the others: tables of the file.
    """

    folder: str
    model: Model
    data: Data
    optimizer: Optimizer
    training: Training
    lora: LoRA | None = None
    devices: Devices = Devices()

    def check(self):
        """**Raises:** `ValueError` if an entry has no such choice, or belongs to another one and would do nothing."""
        places = {"folder": self.folder, "data.path": self.data.path, "data.held_out": self.data.held_out}
        for name, value in places.items():
            for path in [value] if isinstance(value, str) else value or []:
                if not path or "\0" in path:
                    raise InputError(f"The recipe's {name!r} is {shown(path)}, which is no path; correct it.", key=name)
        if self.model.weights and self.model.config:
            raise InputError(
                "The recipe's 'model.config' changes a preset, and the weights of a checkpoint have theirs; leave one "
                "of it and 'model.weights' out."
            )
        if self.training.samples and self.data.kind in MADE:
            raise InputError(
                f"The recipe's 'training.samples' are texts, and data of kind {self.data.kind!r} has none; leave "
                "them out."
            )
        self._check_schedule()
        fresh = {
            "data": Data(self.data.kind, self.data.rows),
            "optimizer": Optimizer(self.optimizer.learning_rate),
        }
        for (table, name), (entry, choices) in _BELONGS.items():
            own = getattr(self, table)
            if getattr(own, name) != getattr(fresh[table], name) and getattr(own, entry) not in choices:
                raise InputError(
                    f"The recipe's '{table}.{name}' does nothing where '{table}.{entry}' is {getattr(own, entry)!r}; "
                    f"it belongs to {', '.join(choices)}."
                )

    def _check_schedule(self):
        optimizer, steps = self.optimizer, self.training.steps
        decay = 1 if optimizer.schedule == "cosine" else optimizer.decay or max(1, steps // 10)
        if optimizer.schedule == "constant" or optimizer.warmup + decay <= steps:
            return
        if decay > steps:
            problem, entry, value = f"'optimizer.decay' is {decay}", "optimizer.decay", max(1, steps // 10)
        else:
            problem, entry, value = (
                f"'optimizer.warmup' is {optimizer.warmup}",
                "optimizer.warmup",
                (steps - decay) // 4,
            )
        raise InputError(
            f"The recipe's {problem}, too many for a run of {steps} steps; add --set {entry}={value}, or take more "
            "steps.",
            key=entry,
        )


MADE = ("sort", "adder")
READ = ("text", "json_lines", "parquet", "chat")
_TEXTS = ("text", "json_lines", "parquet")
# Entries that only some choices of another entry of their table look at.
_BELONGS = {
    ("data", "path"): ("kind", ("characters", *READ)),
    ("data", "held_out"): ("kind", READ),
    ("data", "field"): ("kind", ("json_lines", "parquet", "chat")),
    ("data", "separator"): ("kind", ("text",)),
    ("data", "tokenizer"): ("kind", READ),
    ("data", "on_bad_row"): ("kind", READ),
    ("data", "options"): ("kind", MADE),
    ("data", "objective"): ("kind", _TEXTS),
    ("data", "objective_options"): ("kind", _TEXTS),
    ("optimizer", "warmup"): ("schedule", ("cosine", "wsd")),
    ("optimizer", "end"): ("schedule", ("cosine", "wsd")),
    ("optimizer", "decay"): ("schedule", ("wsd",)),
}


def read_recipe(path: Path, changes: Sequence[str]) -> Recipe:
    """Reads a recipe.

    **Arguments:**

    - `path`: the file.
    - `changes`: entries that are other, such as `"training.steps=100"`; what stands behind the sign is TOML, or a text.

    **Raises:** `ValueError` that names the entry, if one is missing, unknown or of another type.
    """
    document = read_toml(path)
    for change in changes:
        name, sign, text = change.partition("=")
        if not sign or not name:
            raise InputError(f"--set {change!r} does not say what to set; write it as in --set training.steps=100.")
        table = document
        *tables, last = name.split(".")
        for key in tables:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise InputError(f"--set {change!r} goes into {key!r}, which is no table; look at the names in {path}.")
        table[last] = _value(text)
    return _read(Recipe, document, "")


def _value(text: str) -> Any:
    try:
        document = tomllib.loads(f"value = {text}")
    except RecursionError:
        raise InputError(f"--set has the value {shown(text)}, which nests too deep; correct it.") from None
    except ValueError:
        return text
    return document["value"] if len(document) == 1 else text


def _read(kind: type[Any], table: Mapping[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    kinds = kinds_of(kind)
    for name in table:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            meant = repr(where + near[0]) if near else f"one of {', '.join(fields)}"
            entry = where + name
            raise InputError(
                f"The recipe has {shown(entry)}, which there is not; you may have meant {meant}.", key=entry
            )
    for name, field in fields.items():
        is_needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_needed and name not in table:
            entry = where + name
            raise InputError(f"The recipe lacks {entry!r}; add it, or give it with --set {entry}=...", key=entry)
    return kind(**{name: _entry(value, kinds[name], where + name) for name, value in table.items()})


def _entry(value: Any, kind: Any, name: str) -> Any:
    """A value of TOML as its entry has it: a table of its own, or what the annotation says."""
    kinds = (kind, *typing.get_args(kind))
    table = next((one for one in kinds if isinstance(one, type) and dataclasses.is_dataclass(one)), None)
    if table is None:
        return entry_of(value, kind, name)
    return _read(typing.cast(Any, table), entry_of(value, dict, name), f"{name}.")


def entry_of(value: Any, kind: Any, name: str) -> Any:
    """A value that is what the annotation of its entry says.

    **Raises:** `InputError` that names the entry.
    """
    return checked(value, kind, f"The recipe's {name!r}", key=name)
