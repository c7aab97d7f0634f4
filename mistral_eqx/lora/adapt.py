"""Adds adapters to a model, and merges them into its weights."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..arguments import check_key, float_dtype
from ..checks import Count, Positive, ShareBelowOne, checked
from ..errors import InputError
from ..nn import DenseWeight, Embedding, ExpertLinear, Mistral
from ..nn.layers import QuantizableLayer, dims_of, map_quantizable, quantizable_layers
from ..parallel import Strategy, shard, specs, spmd
from ..quant import QUANTIZED
from .weight import LoRAWeight, TrainedWeight


def apply_lora(
    model: Mistral,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    dropout: float = 0.0,
    use_rslora: bool = False,
    train_embeddings: bool = False,
    dtype: DTypeLike = jnp.float32,
    key: PRNGKeyArray,
) -> Mistral:
    """Adds low-rank adapters to some weights of a model ([LoRA](https://arxiv.org/abs/2106.09685)).

    `B` starts at zero, so the model's outputs do not change. Training then changes only the adapters, and keeps an
    optimizer state only for them.

    ```python
    model = mx.apply_lora(model, rank=8, alpha=16.0, targets=("q_proj", "v_proj"), key=jr.key(0))
    ```

    **Arguments:**

    - `model`: a model on one device or on a mesh, with weights in any storage format.
    - `rank`: the rank of the change of a weight.
    - `alpha`: the change is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` with `use_rslora`.
    - `targets`: the names of the layers that get an adapter, in all blocks: `"q_proj"`, `"k_proj"`, `"v_proj"`,
        `"o_proj"`, `"gate_proj"`, `"up_proj"`, `"down_proj"`; and `"embedding"`, `"head"`. With tied embeddings,
        the adapter of the embedding is also that of the head. In a model with experts, each expert has its own.
    - `dropout`: the probability with which a training step drops each entry of an adapter's input. The adapter of an
        embedding drops nothing. Generation and evaluation drop nothing. Adapters of experts have no dropout.
    - `use_rslora`: see [`mistral_eqx.lora.LoRAWeight`][].
    - `train_embeddings`: whether the whole embedding table is trained too.
    - `dtype`: the precision of the adapters, and of the table if it is trained.
    - `key`: the key for `A`, which is uniform within `1 / sqrt(inputs)` of zero, as in PEFT.

    **Returns:** the model.

    **Raises:** `ValueError` if a target is not a layer of the model, `rank` is less than 1 or greater than the number
        of inputs and outputs of every target, `alpha` is not positive, or `dropout` is negative or not less than 1.
    """
    checked(model, Mistral, "model")
    rank = checked(rank, Count, "rank")
    targets = checked(targets, tuple[str, ...], "targets")
    train_embeddings = checked(train_embeddings, bool, "train_embeddings")
    dtype = float_dtype(dtype)
    check_key(key)
    alpha, dropout, use_rslora = _strength(alpha, dropout, use_rslora)
    found = quantizable_layers(model)
    names = dict.fromkeys(_name(path) for path in found)
    unknown = [target for target in targets if target not in names]
    if unknown or not targets:
        what = f"targets has {unknown[0]!r}, which is no layer of the model" if unknown else "targets is empty"
        raise InputError(f"{what}; give some of {', '.join(names)}.", key="targets")
    if train_embeddings and "embedding" in targets:
        raise InputError(
            "The embedding cannot both have an adapter and be trained as a whole; leave out the target 'embedding' or "
            "train_embeddings."
        )
    chosen = [path for path in found if _name(path) in targets]
    widest = max(math.prod(side) for path in chosen for side in shapes_of(found[path])[1:])
    if rank > widest:
        raise InputError(
            f"rank is {rank}, but no target has more than {widest} inputs or outputs; use a smaller rank.", key="rank"
        )
    keys = dict(zip(chosen, jr.split(key, len(chosen)), strict=True))

    def drawn(path: str) -> tuple[Array, Array]:
        stack, inputs, outputs = shapes_of(found[path])
        bound = 1 / math.sqrt(math.prod(inputs))
        a = jr.uniform(keys[path], (*stack, rank, *inputs), dtype, minval=-bound, maxval=bound)
        return a, jnp.zeros((*stack, *outputs, rank), dtype)

    model = adapt(model, {path: drawn(path) for path in chosen}, alpha=alpha, dropout=dropout, use_rslora=use_rslora)
    if train_embeddings:
        table = _dense(model.embedding, model.mesh, model.strategy).astype(dtype)
        model = eqx.tree_at(lambda model: model.embedding.weight, model, TrainedWeight(table, model.dtype))
    return model


def adapt(
    model: Mistral,
    adapters: Mapping[str, tuple[Array, Array]],
    *,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
) -> Mistral:
    """Adds the given adapters to a model.

    **Arguments:**

    - `model`: a model on one device or on a mesh.
    - `adapters`: `A` and `B` for some layers, by the layer's path such as `"blocks.0.attention.q_proj"`.
    - `alpha`, `dropout`, `use_rslora`: as for [`mistral_eqx.apply_lora`][].

    **Raises:** `ValueError` if `alpha`, `dropout` or `use_rslora` is out of its range, or experts are to have adapters
        with dropout.
    """
    alpha, dropout, use_rslora = _strength(alpha, dropout, use_rslora)

    def wrapped(path: str, layer: QuantizableLayer) -> QuantizableLayer:
        if path not in adapters:
            return layer
        a, b = adapters[path]
        # A lookup has no input to drop. With tied embeddings the head has the same adapter, so it drops nothing either.
        rate = 0.0 if isinstance(layer, Embedding) else dropout
        stacked = isinstance(layer, ExpertLinear)
        if stacked and dropout:
            raise InputError(
                f"The adapters of the experts in {path} cannot have dropout; set dropout to 0, or leave the target "
                f"{_name(path)!r} out.",
                key="dropout",
            )
        strategy, factors = model.strategy, (DenseWeight(a), DenseWeight(b))
        weight = LoRAWeight(layer.weight, *factors, alpha, use_rslora, rate, strategy, stacked=stacked)
        return dataclasses.replace(layer, weight=weight)

    model = map_quantizable(wrapped, model)
    return model if model.mesh is None else shard(model, model.mesh, model.strategy)


def _strength(alpha: float, dropout: float, use_rslora: bool) -> tuple[float, float, bool]:
    return (
        checked(alpha, Positive, "alpha"),
        checked(dropout, ShareBelowOne, "dropout"),
        checked(use_rslora, bool, "use_rslora"),
    )


def merge_lora(model: Mistral) -> Mistral:
    """Adds the adapters to their base weights, so that the model is as fast as without adapters.

    **Arguments:**

    - `model`: a model on one device or on a mesh.

    **Returns:** the model, with a dense weight in place of each weight with an adapter: the sum of the base and the
    adapter. Other weights do not change.

    **Raises:** `ValueError` that names a layer whose base is quantized: the sum would be as large as floats are.
    """
    checked(model, Mistral, "model")

    def merged(path: str, layer: QuantizableLayer) -> QuantizableLayer:
        if not isinstance(layer.weight, LoRAWeight | TrainedWeight):
            return layer
        base = layer.weight
        while isinstance(base, LoRAWeight):
            base = base.base
        if isinstance(base, QUANTIZED):
            raise InputError(
                f"{path} is quantized, and the sum with its adapter would have to be stored as floats; expand the "
                "model first with mistral_eqx.dequantize, or keep the adapters beside it."
            )
        return dataclasses.replace(layer, weight=DenseWeight(_dense(layer, model.mesh, model.strategy)))

    return map_quantizable(merged, model)


def has_adapters(tree: PyTree) -> bool:
    """Whether a model has adapters, or a table that is trained as a whole while other weights are not."""
    return any(map(_is_partly_trained, jax.tree.leaves(tree, is_leaf=_is_partly_trained)))


def is_adapter(tree: PyTree) -> PyTree[bool]:
    """Which leaves of a model belong to adapters, or to a table that is trained as a whole."""

    def of(node: Any) -> Any:
        if isinstance(node, LoRAWeight):
            none = _all(node, False)
            return eqx.tree_at(lambda node: (node.a, node.b), none, replace_fn=lambda weight: _all(weight, True))
        return _all(node, isinstance(node, TrainedWeight))

    return jax.tree.map(of, tree, is_leaf=_is_partly_trained)


def shapes_of(layer: QuantizableLayer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The number of experts, if the layer is one of experts, and the shapes of its input and output for one token."""
    shape = eqx.filter_eval_shape(lambda weight: weight.dense(), layer.weight).shape
    stack, inner = int(isinstance(layer, ExpertLinear)), len(shape) - len(dims_of(layer)[0].split())
    return shape[:stack], shape[inner:], shape[stack:inner]


@eqx.filter_jit
def _dense(layer: QuantizableLayer, mesh: Mesh | None, strategy: Strategy) -> Float[Array, "..."]:
    in_dims, out_dims = dims_of(layer)

    def whole(layer: QuantizableLayer) -> Array:
        return layer.weight.dense()

    return spmd(whole, mesh, (specs(layer, strategy),), strategy.spec(f"{out_dims} {in_dims}"))(layer)


def _is_partly_trained(node: Any) -> bool:
    return isinstance(node, LoRAWeight | TrainedWeight)


def _all(tree: PyTree, value: bool) -> PyTree[bool]:
    return jax.tree.map(lambda _: value, tree)


def _name(path: str) -> str:
    return path.rsplit(".", 1)[-1]
