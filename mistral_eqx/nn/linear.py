"""A linear layer over named dimensions; its strategy makes it column- or row-parallel."""

from collections.abc import Sequence

import equinox as eqx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ..parallel import SINGLE, AbstractNamed, Strategy, gathered_product, psum_tokens, scattered_product
from .weight import AbstractWeight


# A rematerialisation policy can save the results of linear layers, after the psum, by this name.
LINEAR = "linear"


class Linear(AbstractNamed):
    """Contracts named input dimensions into named output dimensions, without a bias.

    If the strategy splits an output dimension, the layer is column-parallel: each device has its shard of the result,
    and devices exchange nothing. If it splits an input dimension, the layer is row-parallel: a psum adds the partial
    sums, the layer's only collective ([Megatron-LM](https://arxiv.org/abs/1909.08053)). If it splits `tokens` too, each
    device receives the sums of its own tokens only
    ([Korthikanti et al., 2022](https://arxiv.org/abs/2205.05198)), with `overlap` while it multiplies.

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
        def product(weight: AbstractWeight, x: Array) -> Array:
            return weight.contract(x, self.in_dims, self.out_dims)

        whole = self.weight.depends_on_index
        y = scattered_product(product, self.weight, x, self.in_dims, self.strategy, whole=whole)
        return checkpoint_name(y, LINEAR)

    def array_dims(self) -> dict[str, str]:
        return {f"weight.{field}": dims for field, dims in self.weight.dims(self.in_dims, self.out_dims).items()}


def project(
    x: Float[Array, "batch own *in"], layers: Sequence[Linear], seq: int | None = None, *, to: str = "varying"
) -> list[Float[Array, "batch seq ..."]]:
    """Applies layers to the same activations, in one call if all weights are of one class that has such a kernel.

    **Arguments:**

    - `x`: the tokens of this device, or all of them.
    - `layers`: the layers, with the same input dimensions and the same strategy.
    - `seq`: the number of tokens of each row over all devices that split `tokens`; by default that of `x`.
    - `to`: as for [`mistral_eqx.parallel.all_tokens`][].

    **Returns:** the results for all tokens.
    """
    weights, first, out_dims = [layer.weight for layer in layers], layers[0], [layer.out_dims for layer in layers]

    def product(weights: Sequence[AbstractWeight], x: Array) -> list[Array]:
        if len({type(weight) for weight in weights}) > 1:
            ys = [weight.contract(x, first.in_dims, dims) for weight, dims in zip(weights, out_dims, strict=True)]
        else:
            ys = type(weights[0]).contract_together(weights, x, first.in_dims, out_dims)
        return [y.astype(x.dtype) for y in ys]

    whole = any(weight.depends_on_index for weight in weights)
    seq = x.shape[1] if seq is None else seq
    ys = gathered_product(product, weights, x, seq, first.strategy, out_dims, to=to, whole=whole)
    return [checkpoint_name(psum_tokens(y, first.in_dims, first.strategy), LINEAR) for y in ys]
