"""The rotary embedding in GGUF: keys under `rope.scaling`, the scaling of queries, and Llama 3's tensor of divisors."""

import dataclasses
import math
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le

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
from .gguf_latent import ARCHITECTURES
from .original_positions import add_original_positions
from .settings import Settings


# The tensor of Llama 3's divisors of all angles, shape `(head_dim / 2,)`.
DIVISORS = "rope_freqs.weight"
_Multiplier = Annotated[float, Ge(-1e3), Le(1e3)]


def read_rope(document: Settings, arch: str, max_positions: int) -> tuple[dict[str, Any], float]:
    """Reads the scaling fields of the config.

    As in llama.cpp, a factor without a type is linear, and a file without the original context has the whole one.
    Beside latent attention, YaRN also multiplies the scores, and a file has a tenth of `yarn_log_multiplier`.

    **Arguments:**

    - `document`: the keys and values of the file.
    - `arch`: its architecture, with which the keys begin.
    - `max_positions`: its context.

    **Returns:** the fields, and the factor of the scores of latent attention.
    """
    latent = arch in ARCHITECTURES

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
    log_multiplier = take("rope.scaling.yarn_log_multiplier", _Multiplier if latent else NotNegative, 0.0)
    log_multiplier *= 10 if latent else 1
    magnitude, of_scores = take("rope.scaling.attn_factor", Magnitude, 1.0), 1.0
    scaling: AbstractRopeScaling | None = None
    if kind == "yarn":
        own, divisor = yarn_magnitude(factor), yarn_magnitude(factor, log_multiplier)
        # llama.cpp has another rule for this architecture.
        magnitude *= 1.0 if arch == "deepseek2" and log_multiplier else own / divisor
        if latent:
            magnitude = _near(magnitude, 1.0, own)
            of_scores = _near((magnitude * divisor) ** 2, 1.0, own**2)
        scaling = YarnScaling(factor, original, magnitude, beta_fast, beta_slow)
    elif kind == "linear" and factor != 1:
        if latent:
            raise document.refuse(f"{arch}.rope.scaling.factor", factor)
        scaling = LinearScaling(factor)
    beta, queries = take("attention.temperature_scale", NotNegative | None), None
    length = take("attention.temperature_length", Count | None)
    if beta:
        queries = QueryScaling(beta, original if length is None else length)
    return {"rope_scaling": scaling, "query_scaling": queries}, of_scores


def _near(value: float, *usual: float) -> float:
    """A usual value or a short decimal, if a value differs by the rounding of a file's numbers alone."""
    return next((one for one in (*usual, float(f"{value:.5g}")) if abs(value - one) < 1e-6 * abs(one)), value)


def architecture(config: MistralConfig) -> str:
    """The architecture under which llama.cpp computes what the config asks for."""
    if config.latent is not None:
        return ARCHITECTURES[0]
    yarn = isinstance(config.rope_scaling, YarnScaling)
    return "mistral3" if yarn or config.query_scaling is not None else "llama"


def write_rope(config: MistralConfig) -> dict[str, Any]:
    """The keys and values of the scaling fields.

    **Raises:** `InputError` if the format cannot hold them.
    """
    scaling, queries, found = config.rope_scaling, config.query_scaling, dict[str, Any]()
    latent = config.latent
    if latent is not None and not _holds(scaling, latent.scale):
        raise InputError(
            f"The latent attention has a scale of {latent.scale} and the scaling {scaling} of its rotary embedding, "
            "but a GGUF file can hold YaRN, or neither; use the format 'hf'.",
            key="rope_scaling",
        )
    if isinstance(scaling, LinearScaling):
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    elif isinstance(scaling, YarnScaling) and scaling.truncate:
        usual = scaling.magnitude == yarn_magnitude(scaling.factor)
        multiplier, magnitude = (0.0, 1.0) if usual else (1.0, scaling.magnitude)
        if latent is not None:
            multiplier, magnitude = _of_scores(scaling, latent.scale)
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.original_positions,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
            "rope.scaling.yarn_log_multiplier": multiplier,
        }
        if magnitude != 1:
            found["rope.scaling.attn_factor"] = magnitude
    elif scaling is not None and divisors(config) is None:
        raise InputError(
            f"The rotary embedding has the scaling {scaling}, which a GGUF file cannot hold; use the format 'hf'.",
            key="rope_scaling",
        )
    if queries is not None and latent is not None:
        found["attention.temperature_length"] = queries.original_positions
        found["attention.temperature_scale"] = queries.beta
    elif queries is not None:
        add_original_positions(found, "rope.scaling.original_context_length", queries, "a GGUF file")
        found["attention.temperature_scale"] = queries.beta
    return {f"{architecture(config)}.{key}": value for key, value in found.items()}


def _holds(scaling: AbstractRopeScaling | None, scale: float) -> bool:
    """Whether a file can hold the rotary embedding of latent attention, and the factor of its scores."""
    if isinstance(scaling, YarnScaling):
        return scaling.factor > 1 or math.isclose(scale, scaling.magnitude**2)
    return scaling is None and scale == 1


def _of_scores(scaling: YarnScaling, scale: float) -> tuple[float, float]:
    """The `yarn_log_multiplier` and the `attn_factor` by which llama.cpp computes this factor of the scores.

    With `g(m) = 1 + 0.1 m log(factor)`, where `m` is ten times the multiplier, it multiplies cosines and sines by
    `attn_factor g(1) / g(m)`, and scores by the square of `attn_factor g(1)`.
    """
    ratio = math.sqrt(scale) / scaling.magnitude
    multiplier = 0.0 if math.isclose(ratio, 1) else (ratio - 1) / math.log(scaling.factor)
    return multiplier, math.sqrt(scale) / yarn_magnitude(scaling.factor)


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
