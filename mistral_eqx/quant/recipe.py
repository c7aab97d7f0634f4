"""Quantizes the weights of a model, and expands them again."""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from ..arguments import float_dtype
from ..checks import checked
from ..config import MistralConfig
from ..errors import InputError
from ..nn import DenseWeight, ExpertLinear, Mistral
from ..nn.layers import QuantizableLayer, dims_of, map_quantizable, quantizable_layers
from ..parallel import shard
from .activations import RoundedActivations
from .blocks import BlockWeight
from .blockwise import AnyScheme, quantize_blocks
from .calibration import AbstractCalibratedScheme, checked_calibration
from .ggml import FORMATS
from .mixtures import mixed_type
from .ordered import OrderedWeight
from .scaled import ScaledWeight
from .schemes import GGUF, AbstractScheme, Layer, numbers_of


QUANTIZED = BlockWeight | ScaledWeight | OrderedWeight | RoundedActivations
Recipe = AnyScheme | Mapping[str, AnyScheme | None]
Ids = Int[np.ndarray | Array, "rows seq"] | Sequence[Sequence[int]]


def quantize(
    model: Mistral,
    scheme: Recipe,
    *,
    calibration: Ids | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Mistral:
    """Quantizes the weights of a model, one layer at a time.

    ```python
    small = mx.quantize(model, mx.NF4(block_size=64))
    mixed = mx.quantize(model, {"*.down_proj": mx.Int8(by=64), "blocks.*": mx.NF4(), "head": mx.GGUF("Q8_0")})
    better = mx.quantize(model, mx.GPTQ(group_size=64), calibration=ids)
    ```

    **Arguments:**

    - `model`: a model on one device or on a mesh. A weight that is quantized already is expanded first.
    - `scheme`: a scheme for all linear layers of the blocks. Embedding and head are then left as they are. Or a scheme
        for each pattern of layers' paths, as in `fnmatch`, of which the first that fits is taken; `None` leaves a layer
        as it is.
    - `calibration`: token ids of a text, shape `(rows, seq)`, at least as many as a layer has inputs. `GPTQ` and `AWQ`
        need them, and quantize linear layers of the blocks of a model on one device; experts and latent attention
        `GPTQ` alone. An expert that fewer tokens chose than it has inputs is rounded to the nearest, with a warning.
    - `progress`: called after each layer with the number of layers done so far, and of those there are.

    **Returns:** the model. Norms stay as they are, but for `AWQ`, which moves factors from them, and from the rows of
    `v_proj` and `up_proj`, to the columns of the layers that follow.

    **Raises:** `ValueError` that names the layer, if a scheme does not fit it or it has an adapter; the pattern, if
    no layer fits it; and what is wrong with the calibration.
    """
    checked(model, Mistral, "model")
    layers = quantizable_layers(model)
    chosen = chosen_schemes(scheme, list(layers), model.config)
    for path in chosen:
        if not isinstance(layers[path].weight, DenseWeight | QUANTIZED):
            raise InputError(
                f"{path} has a {type(layers[path].weight).__name__}, which cannot be quantized; merge adapters first, "
                "or quantize the model before it gets them."
            )
    in_blocks, ids = {}, None
    if calibration is not None:
        in_blocks = {path: one for path, one in chosen.items() if path.startswith("blocks.")}
        # Experts with another scheme need not wait for the blocks before theirs.
        in_blocks = {
            path: one
            for path, one in in_blocks.items()
            if isinstance(one, AbstractCalibratedScheme) or not isinstance(layers[path], ExpertLinear)
        }
        ids = _checked_calibration(model, calibration, in_blocks)
    alone = uncalibrated({path: one for path, one in chosen.items() if path not in in_blocks})
    done = 0

    def count():
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(chosen))

    def quantized(path: str, layer: QuantizableLayer) -> QuantizableLayer:
        if path not in alone:
            return layer
        described = Layer.of(path, dims_of(layer)[1], model.mesh, model.strategy)
        weight = alone[path].weight(numbers_of(layer.weight), described)
        count()
        return dataclasses.replace(layer, weight=weight)

    result = map_quantizable(quantized, model)
    if ids is not None:
        return quantize_blocks(result, in_blocks, ids, count)
    return result if model.mesh is None else shard(result, model.mesh, model.strategy)


def _checked_calibration(model: Mistral, calibration: Any, chosen: Mapping[str, AnyScheme]) -> np.ndarray:
    if not any(isinstance(one, AbstractCalibratedScheme) for one in chosen.values()):
        raise InputError(
            "calibration is given, but no layer of a block has a scheme that uses it; leave it out, or choose "
            "mx.GPTQ() or mx.AWQ().",
            key="calibration",
        )
    if model.mesh is not None:
        raise InputError(
            "The model is split over a mesh, on which no calibration runs; quantize it on one device, and then split "
            "it with mx.shard.",
            key="calibration",
        )
    return checked_calibration(calibration, model.config)


def quantized_shapes(model: Mistral, scheme: Recipe, mesh: Mesh | AbstractMesh | None, platform: str) -> Mistral:
    """What `quantize` makes of a model of which only the shapes are known; nothing is allocated.

    **Arguments:**

    - `model`: a model of floats, with `jax.ShapeDtypeStruct`s in place of arrays.
    - `scheme`: as for [`mistral_eqx.quantize`][].
    - `mesh`: the devices over which the model's strategy splits it; they need not be present.
    - `platform`: of these devices, such as `"tpu"`.

    **Returns:** the model, again of shapes.

    **Raises:** `ValueError` as `quantize` does.
    """
    chosen = uncalibrated(chosen_schemes(scheme, list(quantizable_layers(model)), model.config))

    def quantized(path: str, layer: QuantizableLayer) -> QuantizableLayer:
        if path not in chosen:
            return layer
        _, out_dims = dims_of(layer)
        assert isinstance(layer.weight, DenseWeight)
        shape, described = layer.weight.value.shape, Layer.on(platform, path, out_dims, mesh, model.strategy)
        return dataclasses.replace(layer, weight=eqx.filter_eval_shape(lambda: chosen[path].zeros(shape, described)))

    return map_quantizable(quantized, model)


def dequantize(model: Mistral, dtype: DTypeLike | None = None) -> Mistral:
    """Expands all quantized weights to floats, those below adapters too.

    **Arguments:**

    - `model`: a model on one device or on a mesh.
    - `dtype`: the precision of these weights; that of the norms unless given.
    """
    checked(model, Mistral, "model")
    dtype = model.dtype if dtype is None else float_dtype(dtype)

    def expanded(node: Any) -> Any:
        return DenseWeight(jnp.asarray(numbers_of(node), dtype)) if isinstance(node, QUANTIZED) else node

    model = jax.tree.map(expanded, model, is_leaf=lambda node: isinstance(node, QUANTIZED))
    return model if model.mesh is None else shard(model, model.mesh, model.strategy)


def chosen_schemes(recipe: Recipe, paths: Sequence[str], config: MistralConfig) -> dict[str, AnyScheme]:
    """The scheme of each layer that is quantized.

    **Arguments:**

    - `recipe`: as for [`mistral_eqx.quantize`][].
    - `paths`: the paths of all layers.
    - `config`: the model's sizes, by which a mixture chooses.

    **Raises:** `ValueError` that names the pattern, if no layer fits it or its scheme is none.
    """
    if isinstance(recipe, AnyScheme):
        recipe = {"blocks.*": recipe}
    remedy = "such as {'blocks.*': mx.NF4()}"
    patterns: dict[str, Any] = checked(recipe, dict[str, Any], "The recipe", key="scheme", remedy=remedy)
    for pattern, scheme in patterns.items():
        if not (scheme is None or isinstance(scheme, AnyScheme)):
            raise InputError(
                f"The scheme for {pattern!r} is {scheme!r}; give a scheme such as mx.NF4(), or None to leave these "
                "layers as they are.",
                key="scheme",
            )
        if not fnmatch.filter(paths, pattern):
            raise InputError(
                f"No layer of the model fits {pattern!r}; a layer is called 'blocks.0.attention.q_proj', 'embedding' "
                "or 'head', and '*' stands for any letters.",
                key="scheme",
            )
    chosen: dict[str, AnyScheme] = {}
    for path in paths:
        scheme = next((one for pattern, one in patterns.items() if fnmatch.fnmatchcase(path, pattern)), None)
        if isinstance(scheme, GGUF) and scheme.type not in FORMATS:
            scheme = GGUF(mixed_type(scheme.type, path, config))
        if scheme is not None:
            chosen[path] = scheme
        of_experts = config.routing is not None and ".feed_forward." in path
        if of_experts and getattr(scheme, "activations", None):
            raise InputError(
                f"{path} has experts, whose weights {scheme} does not quantize, because it rounds activations; give "
                "experts another scheme, as in {'*.feed_forward.*': mx.NF4(), ...}.",
                key="scheme",
            )
        has_factors = isinstance(scheme, AbstractCalibratedScheme) and scheme.has_factors
        if has_factors and (of_experts or config.latent is not None):
            raise InputError(
                f"{path} is {'of experts' if of_experts else 'beside latent attention'}, whose inputs {scheme} cannot "
                "scale; give it another scheme, as in {" + f"{path!r}" + ": mx.GPTQ(), ...}.",
                key="scheme",
            )
    return chosen


def uncalibrated(chosen: Mapping[str, AnyScheme]) -> dict[str, AbstractScheme]:
    """The same schemes.

    **Raises:** `ValueError` that names the layer, if one needs calibration.
    """
    found: dict[str, AbstractScheme] = {}
    for path, scheme in chosen.items():
        if not isinstance(scheme, AbstractScheme):
            raise InputError(
                f"{path} has the scheme {type(scheme).__name__}, which quantizes the blocks of a loaded model and "
                "needs a calibration; give mx.quantize token ids, as in calibration=ids, and another scheme to other "
                "layers.",
                key="scheme",
            )
        found[path] = scheme
    return found
