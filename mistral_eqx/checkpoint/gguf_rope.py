"""The rotary embedding in GGUF: keys under `rope.scaling`, the scaling of queries, and Llama 3's tensor of divisors."""

import dataclasses
from typing import Any

import numpy as np

from ..checks import Count, NotNegative
from ..config import MistralConfig
from ..errors import InputError
from ..rope import (
    AbstractRopeScaling,
    Factor,
    LinearScaling,
    Llama3Scaling,
    Magnitude,
    QueryScaling,
    Rope,
    Rotations,
    YarnScaling,
    yarn_magnitude,
)
from .gguf_header import shortest
from .original_positions import add_original_positions
from .settings import Settings


# The tensor of Llama 3's divisors of all angles, shape `(head_dim / 2,)`.
DIVISORS = "rope_freqs.weight"


def read_rope(document: Settings, arch: str, max_positions: int) -> dict[str, Any]:
    """Reads the scaling fields of the config.

    As in llama.cpp, a factor without a type is linear, and a file without the original context has the whole one.

    **Arguments:**

    - `document`: the keys and values of the file.
    - `arch`: its architecture, with which the keys begin.
    - `max_positions`: its context.
    """

    def take(name: str, kind: Any, default: Any = None) -> Any:
        value = document.take(f"{arch}.{name}", kind, default)
        return shortest(value) if isinstance(value, float) else value

    document.expect(f"{arch}.rope.scaling.type", ("none", "linear", "yarn", None), None)
    kind = take("rope.scaling.type", str | None) or "linear"
    # A factor of 0 stands for none.
    factor = take("rope.scaling.factor", Factor) if take("rope.scaling.factor", float | None) else 1.0
    original = take("rope.scaling.original_context_length", Count | None) or max_positions
    beta_fast = take("rope.scaling.yarn_beta_fast", Rotations, 32.0)
    beta_slow = take("rope.scaling.yarn_beta_slow", Rotations, 1.0)
    log_multiplier = take("rope.scaling.yarn_log_multiplier", NotNegative, 0.0)
    magnitude = take("rope.scaling.attn_factor", Magnitude, 1.0)
    scaling: AbstractRopeScaling | None = None
    if kind == "yarn":
        magnitude *= yarn_magnitude(factor) / (yarn_magnitude(factor, log_multiplier) if log_multiplier else 1.0)
        scaling = YarnScaling(factor, original, magnitude, beta_fast, beta_slow)
    elif kind == "linear" and factor != 1:
        scaling = LinearScaling(factor)
    beta, queries = take("attention.temperature_scale", NotNegative | None), None
    length = take("attention.temperature_length", Count | None)
    if beta:
        queries = QueryScaling(beta, original if length is None else length)
    return {"rope_scaling": scaling, "query_scaling": queries}


def architecture(config: MistralConfig) -> str:
    """The architecture under which llama.cpp computes what the config asks for."""
    yarn = isinstance(config.rope_scaling, YarnScaling)
    return "mistral3" if yarn or config.query_scaling is not None else "llama"


def write_rope(config: MistralConfig) -> dict[str, Any]:
    """The keys and values of the scaling fields.

    **Raises:** `InputError` if the format cannot hold them.
    """
    scaling, queries, found = config.rope_scaling, config.query_scaling, dict[str, Any]()
    if isinstance(scaling, LinearScaling):
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    elif isinstance(scaling, YarnScaling) and scaling.truncate:
        usual = scaling.magnitude == yarn_magnitude(scaling.factor)
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.original_positions,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
            "rope.scaling.yarn_log_multiplier": 0.0 if usual else 1.0,
        }
        if not usual and scaling.magnitude != 1:
            found["rope.scaling.attn_factor"] = scaling.magnitude
    elif scaling is not None and divisors(config) is None:
        raise InputError(
            f"The rotary embedding has the scaling {scaling}, which a GGUF file cannot hold; use the format 'hf'.",
            key="rope_scaling",
        )
    if queries is not None:
        add_original_positions(found, "rope.scaling.original_context_length", queries, "a GGUF file")
        found["attention.temperature_scale"] = queries.beta
    return {f"{architecture(config)}.{key}": value for key, value in found.items()}


def divisors(config: MistralConfig) -> np.ndarray | None:
    """Llama 3's divisors of all angles in float32, shape `(head_dim / 2,)`; `None` if the config has no such scaling,
    or one that `with_divisors` would not find.
    """
    if not isinstance(config.rope_scaling, Llama3Scaling):
        return None
    found = (Rope(config.head_dim, config.rope_theta).inv_freq / config.rope.inv_freq).astype(np.float32)
    plain = dataclasses.replace(config, rope_scaling=None)
    return found if with_divisors(plain, found) == config else None


def with_divisors(config: MistralConfig, found: np.ndarray) -> MistralConfig | None:
    """The config with the scaling that divides angles so; `None` if Llama 3 has no such scaling.

    The file has the divisors alone. Published models differ in the factor, which is the largest one.
    """
    factor = shortest(float(found.max(initial=1)))
    if factor == 1:
        return config
    if not 1 < factor < 1e6:
        return None
    scaled = dataclasses.replace(config, rope_scaling=Llama3Scaling(factor))
    expected = config.rope.inv_freq / scaled.rope.inv_freq
    # Converters compute them in float32.
    fits = found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4)
    return scaled if fits else None
