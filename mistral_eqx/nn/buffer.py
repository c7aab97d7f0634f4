"""How the keys or the values of a layer are stored in slots: as floats, or as codes of 8 bits."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, UInt8, UInt16

from ..checks import CacheDType
from ..parallel import Strategy, pmax
from .precision import from_bits, to_bits


# The precision of the codes, and the largest of them.
_CODES = {"int8": (jnp.dtype(jnp.int8), 127), "float8_e4m3": (jnp.dtype(jnp.float8_e4m3fn), 448)}


class Buffer(eqx.Module):
    """Keys or values in slots.

    Codes are `number / scale`, rounded to the nearest. The numbers of one token and head share a scale, with which the
    largest of them has the largest code (absmax). `kv_seq` comes after `kv_heads`, so that attention reads each head's
    keys as one block of memory.

    **Attributes:**

    - `numbers`: floats or codes. FP8 codes, and on CPU 16-bit floats, are stored as their bits: XLA can then update one
        slot in place.
    - `scales`: the factor of each token's codes; `None` for floats.
    - `dtype`: the precision of keys and values as they are read.
    - `cache_dtype`: the codes; `None` for floats.
    """

    numbers: (
        Float[Array, "batch kv_heads kv_seq head_dim"]
        | Int8[Array, "batch kv_heads kv_seq head_dim"]
        | UInt8[Array, "batch kv_heads kv_seq head_dim"]
        | UInt16[Array, "batch kv_heads kv_seq head_dim"]
    )
    scales: Float32[Array, "batch kv_heads kv_seq"] | None
    dtype: jnp.dtype = eqx.field(static=True)
    cache_dtype: CacheDType | None = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        shape: tuple[int, int, int, int],
        dtype: DTypeLike,
        cache_dtype: CacheDType | None = None,
        *,
        platform: str | None = None,
    ) -> "Buffer":
        """Zeros of shape `(batch, kv_heads, kv_seq, head_dim)`; the other arguments are those of a cache."""
        dtype = jnp.dtype(dtype)
        if cache_dtype is None:
            bits = dtype.itemsize == 2 and (platform or jax.default_backend()) == "cpu"
            return cls(jnp.zeros(shape, jnp.uint16 if bits else dtype), None, dtype, None)
        stored = jnp.int8 if cache_dtype == "int8" else jnp.uint8
        return cls(jnp.zeros(shape, stored), jnp.zeros(shape[:3], jnp.float32), dtype, cache_dtype)

    @property
    def slots(self) -> int:
        """The number of slots."""
        return self.numbers.shape[2]

    @property
    def floats(self) -> Float[Array, "batch kv_heads kv_seq head_dim"]:
        """The keys or values, as floats."""
        if self.cache_dtype is None or self.scales is None:
            return from_bits(self.numbers, self.dtype)
        codes = from_bits(self.numbers, _CODES[self.cache_dtype][0])
        return (codes.astype(jnp.float32) * self.scales[..., None]).astype(self.dtype)

    def like(self, new: Float[Array, "batch kv_heads own head_dim"], strategy: Strategy) -> "Buffer":
        """New keys or values, stored as those of this buffer are.

        Where `strategy` splits `head_dim`, devices exchange the largest number of each token and head.
        """
        if self.cache_dtype is None:
            numbers = to_bits(new) if self.numbers.dtype == jnp.uint16 else new
            return Buffer(numbers, None, self.dtype, None)
        dtype, largest = _CODES[self.cache_dtype]
        new = new.astype(jnp.float32)
        scales = pmax(jnp.max(jnp.abs(new), axis=-1), "head_dim", strategy) / largest
        # Not `scales > 0`: a scale that is not a number must stay so, for `generate` to refuse the logits.
        scales = jnp.where(scales == 0, 1, scales)
        codes = new / scales[..., None]
        if self.cache_dtype == "int8":
            return Buffer(jnp.round(codes).astype(dtype), scales, self.dtype, self.cache_dtype)
        return Buffer(to_bits(codes.astype(dtype)), scales, self.dtype, self.cache_dtype)

    def grow(self, slots: int) -> "Buffer":
        """A copy with `slots` slots."""
        more = slots - self.slots
        return jax.tree.map(lambda x: jnp.pad(x, [(0, more if axis == 2 else 0) for axis in range(x.ndim)]), self)
