"""What `mistral-eqx train` is told: a file in TOML, and options that change single entries of it."""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Data:
    """**Attributes:**

    - `kind`: `"sort"`, `"adder"`, `"characters"`, `"text"`, `"json_lines"`, `"parquet"` or `"chat"`.
    - `path`: a file, or several, found from where the recipe is.
    - `held_out`: a file, or several, of the same kind, to evaluate on. Sets that are made hold out a part themselves.
    - `field`: of JSON lines or Parquet.
    - `separator`: between the documents of a text.
    - `tokenizer`: as of a checkpoint; the model's own unless given.
    - `options`: of the set that is made, such as `digits`.
    - `seq`, `rows`, `packing`, `seed`: as of [`mistral_eqx.train.data.batches`][].
    - `objective`: the name of one in `mistral_eqx.train`, and `objective_options` what it takes.
    """

    kind: str
    rows: int
    path: str | list[str] | None = None
    held_out: str | list[str] | None = None
    field: str | None = None
    separator: str | None = None
    tokenizer: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    seq: int | None = None
    packing: bool = False
    seed: int = 0
    objective: str = "causal"
    objective_options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """**Attributes:** as of [`mistral_eqx.train.adamw`][], and

    - `schedule`: `"constant"`, `"cosine"` or `"wsd"`, with `warmup`, `decay` and `end`.
    """

    learning_rate: float
    schedule: str = "cosine"
    warmup: int = 0
    decay: int | None = None
    end: float = 0.0
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class Training:
    """**Attributes:** as of [`mistral_eqx.Trainer`][], and

    - `steps`: how many.
    - `early_stop`: after how many evaluations without a new best the run ends.
    - `keep_best`: whether the best model so far is kept.
    - `samples`: texts that are continued at each evaluation.
    - `tensorboard`: whether figures go there; `wandb`: the project that they go to.
    """

    steps: int
    compute_dtype: str = "bfloat16"
    accumulate: int = 1
    clip: float | None = 1.0
    remat: str = "block"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    zero: int = 0
    offload: bool = False
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    evaluate_every: int = 500
    log_every: int = 10
    early_stop: int | None = None
    keep_best: bool = False
    samples: list[str] = dataclasses.field(default_factory=list)
    tensorboard: bool = False
    wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class LoRA:
    """**Attributes:** as of [`mistral_eqx.apply_lora`][]."""

    rank: int
    alpha: float
    targets: list[str] = dataclasses.field(default_factory=lambda: ["q_proj", "v_proj"])
    dropout: float = 0.0
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

    - `folder`: what the run writes goes there: checkpoints, figures, and at the end the model.
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
        for name, value, choices in (
            ("data.kind", self.data.kind, (*MADE, "characters", *READ)),
            ("optimizer.schedule", self.optimizer.schedule, ("constant", "cosine", "wsd")),
            ("training.remat", self.training.remat, ("none", "dots", "block")),
            ("training.compute_dtype", self.training.compute_dtype, ("float32", "bfloat16", "float16")),
        ):
            if value not in choices:
                raise InputError(f"The recipe's {name!r} is {value!r}; it must be one of {', '.join(choices)}.")
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
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}; convert it, as by iconv -t UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is no TOML: {error}; mend it there.") from error
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
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read(kind: type[Any], table: Mapping[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types_of = typing.get_type_hints(kind)
    for name in table:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            meant = repr(where + near[0]) if near else f"one of {', '.join(fields)}"
            raise InputError(f"The recipe has {where + name!r}, which there is not; you may have meant {meant}.")
    for name, field in fields.items():
        is_needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_needed and name not in table:
            raise InputError(f"The recipe lacks {where + name!r}; add it, or give it with --set {where}{name}=...")
    return kind(**{name: typed(value, types_of[name], where + name) for name, value in table.items()})


def typed(value: Any, expected: Any, name: str) -> Any:
    """A value of TOML as the type that an entry has.

    **Raises:** `ValueError` that names the entry, if it is another type's.
    """
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return _read(typing.cast(Any, option), value, f"{name}.")
        if option is float and type(value) is int:
            return float(value)
        if typing.get_origin(option) in (list, Sequence):
            (entries,) = typing.get_args(option)
            if isinstance(value, list) and all(type(entry) is entries for entry in value):
                return value
        elif (isinstance(option, type) and type(value) is option) or (
            typing.get_origin(option) is dict and isinstance(value, dict)
        ):
            return value
    wanted = " or ".join(_NAMES.get(str(option), "a table") for option in options if option is not types.NoneType)
    raise InputError(f"The recipe's {name!r} is {value!r}; it must be {wanted}.")


_NAMES = {
    str(int): "a whole number",
    str(float): "a number",
    str(str): "a text",
    str(bool): "true or false",
    str(list[str]): "a list of texts",
    str(list[int]): "a list of whole numbers",
    str(Sequence[int]): "a list of whole numbers",
}
