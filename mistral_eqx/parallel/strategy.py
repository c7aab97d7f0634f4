"""Which dimensions are split over which axes of the mesh, as one line of text."""

import dataclasses
import functools
import re

from jax.sharding import PartitionSpec


_ENTRY = re.compile(r"([a-z_]+)@([a-z_0-9]+(?:,[a-z_0-9]+)*)")


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Maps names of dimensions to axes of the mesh, in the spirit of einsum.

    A strategy is no array, so in a module it is a leaf that `equinox.filter_jit` treats as static, and one
    `jax.tree.map` swaps it everywhere.

    **Arguments:**

    - `layout`: entries `dim@axis` with spaces between, such as `"kv_heads@tp hidden@tp"`; a dimension may take
        several axes, the major one first: `"hidden@kv,rep"`. A dimension that is not named is not split.

    **Raises:** `ValueError` if an entry is not of that form, or a dimension or one axis of it comes twice.
    """

    layout: str = ""

    def __post_init__(self):
        self._axes  # noqa: B018  (a wrong layout is refused here, not in the middle of a trace)

    @functools.cached_property
    def _axes(self) -> dict[str, tuple[str, ...]]:
        axes: dict[str, tuple[str, ...]] = {}
        for entry in self.layout.split():
            match = _ENTRY.fullmatch(entry)
            if match is None:
                raise ValueError(
                    f"The entry {entry!r} of the strategy {self.layout!r} must be a dimension and its mesh axes, "
                    "such as 'kv_heads@tp' or 'hidden@kv,rep'."
                )
            dim, names = match[1], tuple(match[2].split(","))
            if dim in axes:
                raise ValueError(f"The strategy {self.layout!r} names the dimension {dim!r} twice; keep one entry.")
            if len(set(names)) < len(names):
                raise ValueError(f"The entry {entry!r} of a strategy names one mesh axis twice; keep one.")
            axes[dim] = names
        return axes

    def spec(self, dims: str) -> PartitionSpec:
        """How an array is split over the mesh.

        **Arguments:**

        - `dims`: the array's dimensions in order, such as `"kv_heads head_dim embed"`.

        **Returns:** one entry a dimension, such as `PartitionSpec("tp", None, None)`.
        """
        entries = [self._axes.get(dim, ()) for dim in dims.split()]
        return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in entries))

    def split_over(self, dims: str) -> tuple[str, ...]:
        """The mesh axes over which any of `dims` is split; empty if none is."""
        return tuple(axis for dim in dims.split() for axis in self._axes.get(dim, ()))


SINGLE = Strategy()
