"""Several adapters over one base, of which each row of a batch chooses one."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..checks import checked
from ..errors import InputError
from ..nn import AbstractWeight, Mistral
from ..nn.layers import QuantizableLayer, map_quantizable, quantizable_layers
from ..nn.precision import at_least_float32
from ..parallel import shard
from .weight import LoRAWeight, TrainedWeight


Tree = TypeVar("Tree")


class SeveralLoRAWeight(AbstractWeight):
    """A weight and several low-rank changes of it: row `i` of a batch gets the change `adapter[i]`, or none for -1.

    As in [`mistral_eqx.lora.LoRAWeight`][], the partial sums of a split input are added up in one psum with the base's.

    **Attributes:**

    - `base`: any weight.
    - `a`: dimensions `adapters rank *in`; a smaller rank is padded with zeros.
    - `b`: dimensions `adapters *out rank`.
    - `scales`: the factor of each change.
    - `adapter`: the number of each row's adapter; `None` for no changes.
    """

    base: AbstractWeight
    a: Float[Array, "adapters rank ..."]
    b: Float[Array, "adapters ... rank"]
    scales: Float[Array, " adapters"]
    adapter: Int[Array, " batch"] | None = None

    def contract(self, x: Float[Array, "batch seq *in"], in_dims: str, out_dims: str) -> Float[Array, "batch seq *out"]:
        y = self.base.contract(x, in_dims, out_dims)
        if self.adapter is None:
            return y
        a, b, scales = self._of_rows(self.adapter)
        wide = at_least_float32(a.dtype)
        x = x.astype(a.dtype).reshape(*x.shape[:2], -1)
        a, b = a.reshape(*a.shape[:2], -1), b.reshape(b.shape[0], -1, b.shape[-1])
        low = jnp.einsum("bsi,bri->bsr", x, a, preferred_element_type=wide).astype(a.dtype)
        change = jnp.einsum("bsr,bor->bso", low, b, preferred_element_type=wide)
        return y + (scales[:, None, None] * change).astype(y.dtype).reshape(y.shape)

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        rows = self.base.rows(ids)
        if self.adapter is None:
            return rows
        a, _, scales = self._of_rows(self.adapter)
        low = self.b[jnp.maximum(self.adapter, 0)[:, None], ids]
        change = jnp.einsum("bsr,bri->bsi", low, a, preferred_element_type=at_least_float32(low.dtype))
        return (rows.astype(change.dtype) + scales[:, None, None] * change).astype(rows.dtype)

    @property
    def row_count(self) -> int:
        return self.base.row_count

    def dense(self) -> Float[Array, "..."]:
        """The base alone."""
        return self.base.dense()

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        base = {f"base.{field}": dims for field, dims in self.base.dims(in_dims, out_dims).items()}
        own = {"a": f"_ rank {in_dims}", "b": f"_ {out_dims} rank", "scales": "_", "adapter": "batch"}
        return {**base, **own}

    def _of_rows(self, adapter: Array) -> tuple[Array, Array, Array]:
        """`A`, `B` and the factor of each row."""
        chosen = jnp.maximum(adapter, 0)
        return self.a[chosen], self.b[chosen], jnp.where(adapter < 0, 0, self.scales[chosen])


def with_several(model: Mistral, adapted: Mapping[str, Mistral]) -> Mistral:
    """A model with the adapters of other models that have the same base.

    **Arguments:**

    - `model`: the base, on one device or on a mesh.
    - `adapted`: models that `apply_lora` or `load_lora` made of the base, by name.

    **Returns:** the model; adapter `i` is that of the `i`-th name. Until `for_rows` chooses some, it has no changes.

    **Raises:** `ValueError` if one of `adapted` has another shape, or weights that are trained as a whole, or adapters
        of experts.
    """
    layers = quantizable_layers(model)
    found: dict[str, dict[int, LoRAWeight]] = {}
    for number, (name, other) in enumerate(adapted.items()):
        if checked(other, Mistral, f"The adapter {name!r}").config != model.config:
            raise InputError(f"The adapter {name!r} is for a model of another shape; give adapters of this model.")
        for path, layer in quantizable_layers(other).items():
            weight = layer.weight
            if isinstance(weight, TrainedWeight) or (isinstance(weight, LoRAWeight) and weight.stacked):
                raise InputError(
                    f"The adapter {name!r} changes {path} in a way that rows cannot choose; merge it into a model of "
                    "its own (mistral_eqx.merge_lora)."
                )
            if isinstance(weight, LoRAWeight):
                found.setdefault(path, {})[number] = weight

    def wrapped(path: str, layer: QuantizableLayer) -> QuantizableLayer:
        if path not in found:
            return layer
        return dataclasses.replace(layer, weight=_stacked(layers[path].weight, found[path], len(adapted)))

    model = map_quantizable(wrapped, model)
    return model if model.mesh is None else shard(model, model.mesh, model.strategy)


def for_rows(tree: Tree, adapter: Int[Array, " batch"]) -> Tree:
    """Lets each row of a batch use the adapter of this number, -1 for none."""

    def chosen(node: PyTree) -> PyTree:
        if isinstance(node, SeveralLoRAWeight):
            return dataclasses.replace(node, adapter=adapter)
        return node

    return jax.tree.map(chosen, tree, is_leaf=lambda node: isinstance(node, SeveralLoRAWeight))


def _stacked(base: AbstractWeight, adapters: Mapping[int, LoRAWeight], count: int) -> SeveralLoRAWeight:
    rank = max(weight.rank for weight in adapters.values())

    def padded(value: Array, axis: int) -> Array:
        return jnp.pad(
            value, [(0, rank - value.shape[at] if at == axis % value.ndim else 0) for at in range(value.ndim)]
        )

    def stacked(values: dict[int, Array], axis: int) -> Array:
        none = jnp.zeros_like(padded(next(iter(values.values())), axis))
        return jnp.stack([padded(values[number], axis) if number in values else none for number in range(count)])

    a = stacked({number: weight.a.value for number, weight in adapters.items()}, 0)
    b = stacked({number: weight.b.value for number, weight in adapters.items()}, -1)
    scales = [adapters[number].scale if number in adapters else 0.0 for number in range(count)]
    return SeveralLoRAWeight(base, a, b, jnp.asarray(scales, jnp.float32))
