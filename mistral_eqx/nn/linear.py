"""A linear layer over named dimensions; its strategy makes it column- or row-parallel."""

from collections.abc import Sequence

import equinox as eqx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ..parallel import SINGLE, AbstractNamed, Strategy, psum_tokens
from .weight import AbstractWeight


# A rematerialisation policy can save the results of linear layers, after the psum, by this name.
LINEAR = "linear"


class Linear(AbstractNamed):
    """Contracts named input dimensions into named output dimensions, without a bias.

    If the strategy splits an output dimension, the layer is column-parallel: each device has its shard of the result,
    and devices exchange nothing. If it splits an input dimension, the layer is row-parallel: a psum adds the partial
    sums, the layer's only collective ([Megatron-LM](https://arxiv.org/abs/1909.08053)). If it splits `tokens` too, each
    device receives the sums of its own tokens only
    ([Korthikanti et al., 2022](https://arxiv.org/abs/2205.05198)).

    **Attributes:**

    - `weight`: the linear map, in any storage format.
    - `in_dims`, `out_dims`: names of the contracted and of the resulting dimensions, such as `"embed"` and
        `"kv_heads q_per_kv head_dim"`.
    - `strategy`: which dimensions are split over which mesh axes.
    """

    weight: AbstractWeight
    in_dims: str = eqx.field(static=True)
    out_dims: str = eqx.field(static=True)
    strategy: Strategy = SINGLE

    def __call__(self, x: Float[Array, "batch seq *in"]) -> Float[Array, "batch tokens *out"]:
        return self._summed(self.weight.contract(x, self.in_dims, self.out_dims), x)

    def _summed(self, y: Array, x: Array) -> Array:
        return checkpoint_name(psum_tokens(y.astype(x.dtype), self.in_dims, self.strategy), LINEAR)

    def array_dims(self) -> dict[str, str]:
        return {f"weight.{field}": dims for field, dims in self.weight.dims(self.in_dims, self.out_dims).items()}


def project(x: Float[Array, "batch seq *in"], layers: Sequence[Linear]) -> list[Float[Array, "batch tokens ..."]]:
    """Applies layers to the same activations, in one call if all weights are of one class that has such a kernel."""
    weights = [layer.weight for layer in layers]
    if len({type(weight) for weight in weights}) > 1:
        return [layer(x) for layer in layers]
    together = type(weights[0]).contract_together
    ys = together(weights, x, layers[0].in_dims, [layer.out_dims for layer in layers])
    return [layer._summed(y, x) for layer, y in zip(layers, ys, strict=True)]
