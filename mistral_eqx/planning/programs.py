"""The programs of a plan: the functions of generation and of training, on shapes in place of arrays."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from ..checks import CacheDType
from ..config import MistralConfig
from ..generation import Sampler, caches
from ..generation.flat import Flat
from ..generation.loop import Decoding, decode
from ..generation.reading import CHUNK, prompt_width, read_chunk
from ..nn import Cache, Mistral, stack
from ..parallel import Strategy, specs, with_auto_axes
from ..parallel.mesh import make_mesh
from ..quant import Recipe
from ..train import HOST, Batch, TrainState, adamw, is_offloaded, make_step, trained
from .report import Memory
from .shapes import cache_shapes, device_bytes, is_shape, model_shapes, with_shardings
from .training import Training


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile. It is pickled for another process.

    **Attributes:** those of [`mistral_eqx.planning.Report`][] of the same name, and

    - `topology`: a TPU topology, or `None` for virtual CPU devices.
    - `quantize`: the scheme or recipe of the weights.
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
    cache_dtype: CacheDType | None = None
    training: Training | None = None
    quantize: Recipe | None = None


@dataclasses.dataclass(frozen=True)
class Uncompiled:
    """A function and the shapes that it is compiled for.

    **Attributes:**

    - `name`, `runs`, `tokens`: as in [`mistral_eqx.planning.Phase`][].
    - `function`: takes the arguments `kept` and `given`.
    - `given`: a cache or the state of training; donated if `donates`.
    - `loops`: whether a run is one iteration of the loop in the program.
    - `memory`: the bytes on one device of the weights, the cache and the optimizer state in its arguments and results,
        and of the gradients.
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
        """Traces and lowers the function for a platform, which need not be present."""
        shapes, static = eqx.partition((self.kept, self.given), is_shape)

        def function(kept: PyTree, given: PyTree) -> PyTree:
            return eqx.filter(self.function(*eqx.combine((kept, given), static)), eqx.is_array)

        # Weights take memory in each phase, also where they are unused, so unused arguments are kept. In a step JAX
        # drops the unused ones, as in training.
        jitted = jax.jit(function, donate_argnums=(1,) if self.donates else (), keep_unused=self.name != "step")
        return jitted.trace(*shapes).lower(lowering_platforms=(platform,))


def programs(job: Job, devices: Sequence[Any]) -> Iterator[Uncompiled]:
    """The programs of a job, in the order in which they run.

    **Arguments:**

    - `job`: what to compile.
    - `devices`: the devices of a topology, or virtual ones.
    """
    mesh = with_auto_axes(make_mesh(job.axes, devices))
    if job.training is None:
        yield from _generation(job, mesh, devices[0].platform)
    else:
        yield _training(job, job.training, mesh)


def _generation(job: Job, mesh: Mesh, platform: str) -> Iterator[Uncompiled]:
    strategy = Strategy(job.layout)

    def sharded(tree: PyTree) -> PyTree:
        return with_shardings(tree, specs(tree, strategy), mesh)

    def array(dims: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, strategy.spec(dims)))

    model = model_shapes(job.config, job.dtype, strategy, mesh, platform, job.quantize)
    model = dataclasses.replace(model, mesh=mesh)
    weights = device_bytes(model)

    width = prompt_width(job.prompt)
    least = min(width, CHUNK)

    def cache_of(kv_seq: int) -> Cache:
        return cache_shapes(job.config, job.batch, kv_seq, job.dtype, job.cache_dtype, least, strategy, mesh, platform)

    small = cache_of(caches.slots(model, width))
    chunk = min(width, CHUNK * model.prefill_devices(small))
    yield Uncompiled(
        name="prefill",
        runs=math.ceil(width / chunk),
        tokens=chunk,
        function=_without_jit(read_chunk),
        kept=(model, array("batch _", job.batch, chunk), array("batch _", job.batch, chunk)),
        given=small,
        donates=True,
        loops=False,
        memory=Memory(weights, cache=device_bytes(small.layers)),
    )

    large = cache_of(caches.slots(model, job.kv_seq))
    if large.kv_seq > small.kv_seq:
        yield Uncompiled(
            name="grow",
            runs=1,
            tokens=0,
            function=lambda model, cache: _without_jit(caches.grow)(model, cache, large.kv_seq),
            kept=model,
            given=small,
            donates=False,
            loops=False,
            memory=Memory(weights, cache=device_bytes(small.layers) + device_bytes(large.layers)),
        )

    def state() -> Decoding:
        rows = jnp.zeros(job.batch, jnp.int32)
        return Decoding.init(rows, rows > 0, jr.split(jr.key(0), job.batch), large.kv_seq)

    yield Uncompiled(
        name="decode",
        runs=1,
        tokens=1,
        function=_without_jit(decode),
        kept=(Flat(model), sharded(eqx.filter_eval_shape(state)), Sampler(), array("ends", 1), array("")),
        given=large,
        donates=True,
        loops=True,
        memory=Memory(weights, cache=device_bytes(large.layers)),
    )


def _training(job: Job, training: Training, mesh: Mesh) -> Uncompiled:
    strategy, optimizer = Strategy(job.layout), adamw(1e-4)
    options: dict[str, Any] = {"accumulate": training.accumulate, "remat": training.remat}
    options["schedule"] = training.schedule
    step = make_step(optimizer, compute_dtype=jnp.dtype(job.dtype), **options)

    def init() -> TrainState:
        model = Mistral.init(job.config, dtype=jnp.float32, strategy=strategy, key=jr.key(0))
        model = stack(dataclasses.replace(model, mesh=mesh))
        return TrainState.init(model, optimizer, zero=training.zero, offload=training.offload)

    shapes = eqx.filter_eval_shape(init)
    state = with_shardings(shapes, shapes.specs(optimizer), mesh)
    moments = device_bytes(state.optimizer_state)
    if training.offload:
        state = eqx.tree_at(lambda state: state.optimizer_state, state, replace_fn=_on_host)
    # In stage 1 each device accumulates whole gradients, and updates its own shard.
    whole = specs(shapes.model, strategy)
    gradient_specs = state.zero.specs(whole, state.shard_dims()) if training.zero > 1 else whole
    has_gradient = trained(shapes.model)
    gradients = device_bytes(
        with_shardings(eqx.filter(shapes.model, has_gradient), eqx.filter(gradient_specs, has_gradient), mesh)
    )
    batch = eqx.filter_eval_shape(lambda: _batch(job.batch, training.seq))
    batch = with_shardings(batch, jax.tree.map(lambda _: strategy.spec("batch"), batch), mesh)
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
            device_bytes(state.model),
            optimizer=0 if training.offload else moments,
            gradients=gradients,
            host=moments if training.offload else 0,
        ),
    )


def _without_jit(compiled: Any) -> Callable[..., Any]:
    """The function inside `equinox.filter_jit`, whose own lowering needs devices that are present."""
    return compiled.__wrapped__


def _batch(rows: int, seq: int) -> Batch:
    ids = jnp.zeros((rows, seq), jnp.int32)
    return Batch(ids, ids, jnp.ones(ids.shape, jnp.float32), ids, ids, ids)


def _on_host(tree: PyTree) -> PyTree:
    """The shapes of a tree, with shardings in host memory."""

    def moved(leaf: Any) -> Any:
        if not is_offloaded(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(HOST))

    return jax.tree.map(moved, tree)
