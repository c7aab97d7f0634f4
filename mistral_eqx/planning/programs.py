"""The programs of a plan: the functions that `generate` and training run, on shapes in place of arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from ..config import MistralConfig
from ..generation import Sampler, caches
from ..generation.loop import Decoding, decode
from ..generation.reading import CHUNK, prompt_width, read_piece
from ..nn import Cache, Mistral
from ..parallel import Strategy, by_hand, specs
from ..parallel.mesh import make_mesh
from ..train import HOST, Batch, TrainState, adamw, is_offloaded, make_step, trained
from .report import Memory
from .training import Training


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be compiled, in numbers and texts that another process can be told.

    **Attributes:** those of [`mistral_eqx.planning.Report`][] of the same name, and

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
    training: Training | None = None


@dataclasses.dataclass(frozen=True)
class Uncompiled:
    """A function of the package and the shapes that it is compiled for.

    **Attributes:**

    - `name`, `runs`, `tokens`: as in [`mistral_eqx.planning.Phase`][].
    - `function`: takes `kept` and `given`, a cache or the state of training, of which it is given the second one for
        good if `donates`.
    - `loops`: whether a run of it is a turn of a loop.
    - `memory`: how many bytes of its arguments and results on one device are weights, keys and values, and the
        optimizer's state, and how many gradients there are besides.
    """

    name: str
    runs: int
    tokens: int
    function: Callable[..., Any]
    kept: PyTree
    given: PyTree
    donates: bool
    loops: bool
    memory: Memory

    def lower(self, platform: str) -> jax.stages.Lowered:
        """Traces it for a platform that need not be here."""
        shapes, static = eqx.partition((self.kept, self.given), _is_shape)

        def function(kept: PyTree, given: PyTree) -> PyTree:
            return eqx.filter(self.function(*eqx.combine((kept, given), static)), eqx.is_array)

        # The weights take memory in each phase, also in one that has no use for them. A step uses all that it is given;
        # then JAX also leaves out what nobody reads.
        jitted = jax.jit(function, donate_argnums=(1,) if self.donates else (), keep_unused=self.name != "step")
        return jitted.trace(*shapes).lower(lowering_platforms=(platform,))


def programs(job: Job, devices: Sequence[Any]) -> Iterator[Uncompiled]:
    """The programs of a job, in the order in which they run.

    **Arguments:**

    - `job`: the shapes.
    - `devices`: those of a topology, or virtual ones.
    """
    mesh = by_hand(make_mesh(job.axes, devices))
    if job.training is None:
        yield from _generation(job, mesh, devices[0].platform)
    else:
        yield _training(job, job.training, mesh)


def _generation(job: Job, mesh: Mesh, platform: str) -> Iterator[Uncompiled]:
    strategy, dtype = Strategy(job.layout), jnp.dtype(job.dtype)

    def place(tree: PyTree) -> PyTree:
        return _placed(tree, specs(tree, strategy), mesh)

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
        given=small,
        donates=True,
        loops=False,
        memory=Memory(weights, cache=_bytes(small.layers)),
    )

    large = cache_of(caches.slots(model, job.kv_seq))
    if large.kv_seq > small.kv_seq:
        yield Uncompiled(
            name="grow",
            runs=1,
            tokens=0,
            function=lambda model, cache: _plain(caches.grow)(model, cache, large.kv_seq),
            kept=model,
            given=small,
            donates=False,
            loops=False,
            memory=Memory(weights, cache=_bytes(small.layers) + _bytes(large.layers)),
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
        given=large,
        donates=True,
        loops=True,
        memory=Memory(weights, cache=_bytes(large.layers)),
    )


def _training(job: Job, training: Training, mesh: Mesh) -> Uncompiled:
    strategy, optimizer = Strategy(job.layout), adamw(1e-4)
    options: dict[str, Any] = {"accumulate": training.accumulate, "remat": training.remat}
    step = make_step(optimizer, compute_dtype=jnp.dtype(job.dtype), **options)

    def init() -> TrainState:
        model = Mistral.init(job.config, dtype=jnp.float32, strategy=strategy, key=jr.key(0))
        model = dataclasses.replace(model, mesh=mesh)
        return TrainState.init(model, optimizer, zero=training.zero, offload=training.offload)

    shapes = eqx.filter_eval_shape(init)
    state = _placed(shapes, shapes.specs(optimizer), mesh)
    moments = _bytes(state.optimizer_state)
    if training.offload:
        state = eqx.tree_at(lambda state: state.optimizer_state, state, replace_fn=_on_host)
    # In the first stage each device adds up whole gradients, and then updates its own part.
    whole = shapes.model.specs(strategy)
    place = state.zero.specs(whole, state.cuts()) if training.zero > 1 else whole
    has_gradient = trained(shapes.model)
    gradients = _bytes(_placed(eqx.filter(shapes.model, has_gradient), eqx.filter(place, has_gradient), mesh))
    batch = eqx.filter_eval_shape(lambda: _batch(job.batch, training.seq))
    batch = _placed(batch, jax.tree.map(lambda _: strategy.spec("batch"), batch), mesh)
    return Uncompiled(
        name="step",
        runs=1,
        tokens=training.seq,
        function=lambda batch, state: step(state, batch),
        kept=batch,
        given=state,
        donates=True,
        loops=False,
        memory=Memory(
            _bytes(state.model),
            optimizer=0 if training.offload else moments,
            gradients=gradients,
            host=moments if training.offload else 0,
        ),
    )


def _plain(compiled: Any) -> Callable[..., Any]:
    """The function that `equinox.filter_jit` was given: it can only be compiled for devices that are here."""
    return compiled.__wrapped__


def _batch(rows: int, seq: int) -> Batch:
    ids = jnp.zeros((rows, seq), jnp.int32)
    return Batch(ids, ids, jnp.ones(ids.shape, jnp.float32), ids, ids, ids)


def _placed(tree: PyTree, place: PyTree, mesh: Mesh) -> PyTree:
    """Shapes that say where on the mesh their entries are."""

    def placed(leaf: Any, spec: Any) -> Any:
        if not _is_shape(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, tree, place)


def _on_host(tree: PyTree) -> PyTree:
    """The same, in the host's memory."""

    def moved(leaf: Any) -> Any:
        if not is_offloaded(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(HOST))

    return jax.tree.map(moved, tree)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _bytes(tree: PyTree) -> int:
    """The bytes that one device has of all arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if _is_shape(leaf)
    )
