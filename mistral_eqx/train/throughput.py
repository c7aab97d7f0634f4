"""Model FLOPs utilisation (MFU): the operations of a model, and the peak of a device."""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..lora import has_adapters
from ..nn import Stacked
from .trained import trained


def flops_per_token(model: Stacked, seq: int) -> float:
    """Floating-point operations of a step for one token, forward and backward
    ([PaLM, appendix B](https://arxiv.org/abs/2204.02311)).

    Each entry of a matrix counts two forward, two backward for the gradient of the input, and two for its own gradient
    if it is trained. Of the experts, those that compute the token count. Attention counts
    `6 layers heads (head_dim + value_dim) seq`, as if each token attended to all others.
    Rematerialisation does not count.

    **Arguments:**

    - `model`: the model in training.
    - `seq`: the number of columns of a row.
    """
    config = model.outer.config
    computed = 0 if config.routing is None else config.routing.per_token
    entries = config.matrix_entries(computed) + config.vocab * config.embed
    if has_adapters(model):
        total = 4 * entries + 6 * sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, trained(model))))
    else:
        total = 6 * entries
    return float(total) + 6 * config.layers * config.q_heads * (config.head_dim + config.value_dim) * seq


def peak_flops(dtype: DTypeLike, *, size: int = 1024, repetitions: int = 5) -> float:
    """Measured floating-point operations per second of one device, in a product of two square matrices.

    The peak in a data sheet is higher, but no program reaches it.

    **Arguments:**

    - `dtype`: the precision of the matrices.
    - `size`: the number of their rows.
    - `repetitions`: the number of measurements; the fastest counts.
    """
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    product(matrix, matrix).block_until_ready()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
