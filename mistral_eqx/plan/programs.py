"""The programs of a plan: the functions that `generate` runs, on shapes in place of arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from ..config import MistralConfig
from ..generate import Sampler, caches
from ..generate.loop import Decoding, decode
from ..generate.reading import CHUNK, prompt_width, read_piece
from ..nn import Cache, Mistral
from ..parallel import Strategy, by_hand, specs
from ..parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be compiled, in numbers and texts that another process can be told.

    **Attributes:** those of [`mistral_eqx.plan.Report`][] of the same name, and

    - `topology`: of a TPU, or `None` for virtual devices of the CPU.
    """

    config: MistralConfig
    topology: str | None
    devices: int
    layout: str
    axes: dict[str, int]
    batch: int
    prompt: int
    kv_seq: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Uncompiled:
    """A function of the package and the shapes that it is compiled for.

    **Attributes:**

    - `name`, `runs`, `tokens`: as in [`mistral_eqx.plan.Phase`][].
    - `function`: takes `kept` and `cache`, of which it is given the second one for good if `donates`.
    - `loops`: whether a run of it is a turn of a loop.
    - `weights`, `cache_bytes`: how many bytes of its arguments and results on one device are weights, and how many are
        keys and values.
    """

    name: str
    runs: int
    tokens: int
    function: Callable[..., Any]
    kept: PyTree
    cache: Cache
    donates: bool
    loops: bool
    weights: int
    cache_bytes: int

    def lower(self, platform: str) -> jax.stages.Lowered:
        """Traces it for a platform that need not be here."""
        shapes, static = eqx.partition((self.kept, self.cache), _is_shape)

        def function(kept: PyTree, cache: PyTree) -> PyTree:
            return eqx.filter(self.function(*eqx.combine((kept, cache), static)), eqx.is_array)

        # The weights take memory in each phase, also in one that has no use for them.
        jitted = jax.jit(function, donate_argnums=(1,) if self.donates else (), keep_unused=True)
        return jitted.trace(*shapes).lower(lowering_platforms=(platform,))


def programs(job: Job, devices: Sequence[Any]) -> Iterator[Uncompiled]:
    """The programs of a job, in the order in which they run.

    **Arguments:**

    - `job`: the shapes.
    - `devices`: those of a topology, or virtual ones.
    """
    strategy = Strategy(job.layout)
    mesh = by_hand(make_mesh(job.axes, devices))
    platform = devices[0].platform
    dtype = jnp.dtype(job.dtype)

    def place(tree: PyTree) -> PyTree:
        def placed(leaf: Any, spec: Any) -> Any:
            if not _is_shape(leaf):
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(placed, tree, specs(tree, strategy))

    def array(dims: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, strategy.spec(dims)))

    init = functools.partial(Mistral.init, job.config, dtype=dtype, strategy=strategy)
    model = place(eqx.filter_eval_shape(init, key=jr.key(0)))
    model = dataclasses.replace(model, mesh=mesh)
    weights = _bytes(model)

    width = prompt_width(job.prompt)
    piece = min(width, CHUNK)

    def cache_of(kv_seq: int) -> Cache:
        shares = caches.parts(model, "kv_seq")
        init = functools.partial(
            Cache.init, job.config, job.batch, kv_seq, dtype, platform=platform, piece=piece, shares=shares
        )
        return place(eqx.filter_eval_shape(init))

    small = cache_of(caches.slots(model, width))
    yield Uncompiled(
        name="prefill",
        runs=math.ceil(width / piece),
        tokens=piece,
        function=_plain(read_piece),
        kept=(model, array("batch _", job.batch, piece), array("batch _", job.batch, piece)),
        cache=small,
        donates=True,
        loops=False,
        weights=weights,
        cache_bytes=_bytes(small.layers),
    )

    large = cache_of(caches.slots(model, job.kv_seq))
    if large.kv_seq > small.kv_seq:
        yield Uncompiled(
            name="grow",
            runs=1,
            tokens=0,
            function=lambda model, cache: _plain(caches.grow)(model, cache, large.kv_seq),
            kept=model,
            cache=small,
            donates=False,
            loops=False,
            weights=weights,
            cache_bytes=_bytes(small.layers) + _bytes(large.layers),
        )

    def state() -> Decoding:
        rows = jnp.zeros(job.batch, jnp.int32)
        return Decoding.init(rows, rows > 0, jr.split(jr.key(0), job.batch), large.kv_seq)

    yield Uncompiled(
        name="decode",
        runs=1,
        tokens=1,
        function=_plain(decode),
        kept=(model, place(eqx.filter_eval_shape(state)), Sampler(), array("ends", 1), array("")),
        cache=large,
        donates=True,
        loops=True,
        weights=weights,
        cache_bytes=_bytes(large.layers),
    )
    # A step of training goes here, once there is one.


def _plain(compiled: Any) -> Callable[..., Any]:
    """The function that `equinox.filter_jit` was given: it can only be compiled for devices that are here."""
    return compiled.__wrapped__


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _bytes(tree: PyTree) -> int:
    """The bytes that one device has of all arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if _is_shape(leaf)
    )
