"""The rotary embedding in `config.json`: `rope_parameters` of transformers 5, and `rope_scaling` of transformers 4."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..checks import Count, NotNegative
from ..config import Base, Latent, MistralConfig
from ..documents import shown
from ..errors import InputError
from ..rope import (
    AbstractRopeScaling,
    Factor,
    LinearScaling,
    Llama3Scaling,
    Magnitude,
    QueryScaling,
    Rotations,
    YarnScaling,
    yarn_magnitude,
)
from .original_positions import add_original_positions
from .settings import REASONS, REQUIRED, Settings, consistent_value, listed


@dataclasses.dataclass(frozen=True)
class _Table:
    """The keys of `rope_parameters` or of `rope_scaling`, and the model's longest context."""

    settings: Settings
    key: str
    max_positions: int

    def take(self, name: str, kind: Any, default: Any = REQUIRED) -> Any:
        return self.settings.take(f"{self.key}.{name}", kind, default)

    def original_positions(self) -> int:
        return self.take("original_max_position_embeddings", Count | None, None) or self.max_positions


def _default(table: _Table) -> None:
    if (factor := table.take("factor", float | None, None)) not in (None, 1.0):
        raise table.settings.refuse(f"{table.key}.factor", factor)


def _linear(table: _Table) -> LinearScaling:
    return LinearScaling(table.take("factor", Factor))


def _llama3(table: _Table) -> Llama3Scaling:
    low, high = table.take("low_freq_factor", Rotations), table.take("high_freq_factor", Rotations)
    return Llama3Scaling(table.take("factor", Factor), low, high, table.original_positions())


def _yarn(table: _Table) -> YarnScaling:
    original = table.original_positions()
    factor = table.take("factor", Factor | None)
    factor = table.max_positions / original if factor is None else factor
    magnitude = table.take("attention_factor", Magnitude | None, None)
    of_rotated, of_all = (table.take(key, NotNegative | None, None) for key in ("mscale", "mscale_all_dim"))
    if magnitude is None and of_rotated and of_all:
        magnitude = yarn_magnitude(factor, of_rotated) / yarn_magnitude(factor, of_all)
    elif magnitude is None:
        magnitude = yarn_magnitude(factor)
    beta_fast, beta_slow = (table.take(key, Rotations | None, None) for key in ("beta_fast", "beta_slow"))
    truncate = table.take("truncate", bool, True)
    return YarnScaling(factor, original, magnitude, beta_fast or 32.0, beta_slow or 1.0, truncate)


_KINDS: Mapping[str, Callable[[_Table], AbstractRopeScaling | None]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def read_rope(
    document: Settings,
    max_positions: int,
    *,
    absent: Mapping[str, Any] | None = None,
    scales_queries: bool = False,
    rotated: float = 1.0,
) -> dict[str, Any]:
    """Reads the fields of the config that describe the rotary embedding.

    **Arguments:**

    - `document`: the `config.json`.
    - `max_positions`: the model's longest context, which stands for a missing original one.
    - `absent`: the table of a model type for which the config has none.
    - `scales_queries`: whether the model type scales queries by `llama_4_scaling_beta`.
    - `rotated`: the share of a head's entries that are rotated.

    **Raises:** `InputError` that names the key, if a key has an invalid value, contradicts another key, or asks for a
    type that is not supported.
    """
    thetas = {"rope_theta": document.take("rope_theta", Base | None, None)}
    tables = {key: document.take(key, dict[str, Any] | None, None) for key in ("rope_parameters", "rope_scaling")}
    if absent is not None and all(values is None for values in tables.values()):
        tables["rope_parameters"] = dict(absent)
    found: dict[str, dict[str, Any]] = {}
    for key, values in tables.items():
        if not values:
            continue
        if any(isinstance(value, Mapping) for value in values.values()):
            raise document.refuse(key, values)
        settings = Settings({f"{key}.{name}": value for name, value in values.items()}, document.name, document.file)
        table = _Table(settings, key, max_positions)
        thetas[f"{key}.rope_theta"] = table.take("rope_theta", Base | None, None)
        found[key] = _scalings(table, scales_queries, rotated)
    first = next(iter(found.values()), {})
    if any(other != first for other in found.values()):
        raise document.wrong(
            "rope_scaling",
            f"{document.name} describes the rotary embedding in rope_parameters and otherwise in rope_scaling; keep "
            "the right one.",
        )
    return {"rope_theta": consistent_value(thetas, document, 10000.0), **first}


def _scalings(table: _Table, scales_queries: bool, rotated: float) -> dict[str, Any]:
    settings, key = table.settings, table.key
    kind, old = (table.take(name, str | None, None) for name in ("rope_type", "type"))
    kind = kind or old or "default"
    if kind not in _KINDS:
        raise settings.wrong(
            key,
            f"{settings.name} asks for the rope type {shown(kind)} in {key}, which is not supported"
            f"{REASONS.get(kind, '')}; the supported ones are {listed(_KINDS)}.",
        )
    settings.expect(f"{key}.partial_rotary_factor", (rotated, None), None, float | None)
    with settings.naming():
        scaling, queries = _KINDS[kind](table), None
        if scales_queries:
            # Without a factor of queries, their original context has no effect.
            beta = table.take("llama_4_scaling_beta", NotNegative | None, None)
            original = table.take("original_max_position_embeddings", Count | None, REQUIRED if beta else None)
            queries = QueryScaling(beta, original) if beta else None
    settings.refuse_rest(frozenset({f"{key}.max_position_embeddings"}))
    return {"rope_scaling": scaling, "query_scaling": queries}


def read_softmax_scale(document: Settings) -> float:
    """The factor of latent attention's scores beside that by the width of a head.

    transformers multiplies them by the square of `yarn_magnitude(factor, mscale_all_dim)`. But releases whose
    `params.json` says `apply_scale` false, which leaves scores alone, have equal `mscale` and `mscale_all_dim`, and no
    `attention_factor`: they have the factor 1.
    """
    tables = (document.take(key, dict[str, Any] | None, None) for key in ("rope_parameters", "rope_scaling"))
    table = next(filter(None, tables), {})
    factor, of_all = table.get("factor"), table.get("mscale_all_dim")
    plain = table.get("attention_factor") is None and table.get("mscale") == of_all
    # `read_rope` says what is wrong with the values.
    if plain or not all(isinstance(value, int | float) and value > 0 for value in (factor, of_all)):
        return 1.0
    return yarn_magnitude(table["factor"], table["mscale_all_dim"]) ** 2


def write_rope(config: MistralConfig) -> dict[str, Any]:
    """The keys of `config.json` that describe the rotary embedding, for transformers 4 and 5.

    Without a key of its own, either version would silently use its default.

    **Raises:** `InputError` if the format cannot hold the config's kind of scaling.
    """
    scaling, queries = config.rope_scaling, config.query_scaling
    table = _written(scaling)
    if config.latent is not None:
        _add_latent(table, config, config.latent)
    if queries is not None:
        add_original_positions(table, "original_max_position_embeddings", queries, "config.json")
        table["llama_4_scaling_beta"] = queries.beta
    theta = {"rope_theta": config.rope_theta}
    scaled = {} if scaling is None and queries is None else {"rope_scaling": table}
    return {**theta, "rope_parameters": {**table, **theta}, **scaled}


def _add_latent(table: dict[str, Any], config: MistralConfig, latent: Latent):
    """Changes the keys so that transformers computes the model of type `mistral4`, with its factor of the scores."""
    table["partial_rotary_factor"] = latent.rope_dim / config.head_dim
    if config.query_scaling is None:
        table["llama_4_scaling_beta"] = 0.0
        table.setdefault("original_max_position_embeddings", config.max_positions)
    yarn = config.rope_scaling if isinstance(config.rope_scaling, YarnScaling) else None
    if yarn is not None:
        for key in ("mscale", "mscale_all_dim"):
            table.pop(key, None)
        table["attention_factor"] = yarn.magnitude
    if latent.scale == 1:
        return
    if yarn is None or latent.scale != yarn_magnitude(yarn.factor) ** 2:
        raise InputError(
            f"The config's latent.scale is {latent.scale}, and config.json can hold 1 or the square of YaRN's own "
            "magnitude; no format holds this model.",
            key="scale",
        )
    table["mscale_all_dim"] = 1.0


def _written(scaling: AbstractRopeScaling | None) -> dict[str, Any]:
    match scaling:
        case None:
            return {"rope_type": "default"}
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        case YarnScaling(factor, original, magnitude, beta_fast, beta_slow, truncate):
            table: dict[str, Any] = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
            }
            if magnitude in (1.0, yarn_magnitude(factor)):
                table |= {"mscale": 1.0, "mscale_all_dim": float(magnitude == 1)}
            else:
                table["attention_factor"] = magnitude
            return table if truncate else {**table, "truncate": False}
        case _:
            raise InputError(
                f"The config's rope_scaling is a {type(scaling).__name__}, which config.json cannot hold; use a kind "
                "of mistral_eqx.rope.",
                key="rope_scaling",
            )
