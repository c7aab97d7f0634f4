"""Loads a model from a checkpoint onto its devices."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from ..checks import Count, checked
from ..errors import InputError
from ..nn import AbstractWeight, DenseWeight, Mistral, Stacked, stack
from ..nn.kernels import native
from ..parallel import SINGLE, Strategy, check_same, check_shapes, put_named, with_auto_axes
from ..quant import AbstractScheme, Layer, Recipe, chosen_schemes, uncalibrated
from .hub import locate
from .opening import open_checkpoint
from .packed import read_packed
from .placement import Placement
from .processes import fingerprint, run_on_all
from .reader import DTYPES, READS, Checkpoint
from .source import Source, SourceOfLayers, sources


Progress = Callable[[int, int], None]
Tree = TypeVar("Tree")
Found = TypeVar("Found", bound=Source | SourceOfLayers)

# Bytes of small tensors that are on their way to the devices at the same time.
TOGETHER = 64 * 2**20


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    check: bool = False,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    strategy: Strategy = SINGLE,
    quantize: Recipe | None = None,
) -> Mistral:
    """Loads a model: one large tensor or a few small ones at a time are read, cast and put on their devices.

    ```python
    model = mx.load("path", mesh=jax.make_mesh((8,), ("tp",)), strategy=mx.HEADS)
    ```

    With a mesh, each process reads only the shards of its own devices. With several processes, all of them must call
    this function, and an error on one process raises a `ValueError` on all.

    **Arguments:**

    - `path`: a Hugging Face folder, a Mistral release folder, a `.gguf` file, or a name that
        [`mistral_eqx.checkpoint.locate`][] finds.
    - `dtype`: the dtype of all weights: `"float32"`, `"bfloat16"` or `"float16"`, to which quantized weights are
        expanded. By default quantized weights stay as they are ([`mistral_eqx.quant.BlockWeight`][]), and others have
        the main dtype of the files, which counts quantized weights as float32. In a GGUF file whose matrices differ in
        type, each keeps its own, and activations are float32.
    - `check`: whether to check every weight, and refuse NaN and infinity.
    - `progress`: called after each tensor with the bytes read so far and the total bytes that this process reads.
    - `mesh`: the devices of the model; the default device unless given.
    - `strategy`: which dimensions are split over which axes of the mesh. By default each device holds the whole model.
        [`mistral_eqx.load_stacked`][] takes one that splits `layers`.
    - `quantize`: a scheme or a recipe, as for [`mistral_eqx.quantize`][]. Each weight is quantized when it is read, so
        that memory holds the result and one weight in float32. Schemes that need a calibration are refused.

    **Returns:** the model, sharded as by [`mistral_eqx.shard`][].

    **Raises:** `ValueError` that names the file, the key of the config, the tensor, or the dimension that the
    strategy cannot split; with several processes, also if their checkpoints, strategies, meshes or dtypes differ.
    """
    if mesh is None and strategy != SINGLE:
        raise InputError(
            f"The strategy {strategy.layout!r} splits a model over a mesh, but none is given; make one with its axes, "
            "as in load(path, mesh=jax.make_mesh((8,), ('tp',)), strategy=...)."
        )
    if strategy.axes("layers"):
        raise InputError(
            f"The strategy {strategy.layout!r} splits 'layers', for which blocks are stacked; load the model with "
            "mistral_eqx.load_stacked."
        )
    placement = Placement(None if mesh is None else with_auto_axes(mesh), strategy)
    checkpoint, target_dtype, found = _opened(path, dtype, placement)
    keep = dtype is None and any(source.tensor.packed is not None for source in found)
    if placement.several_processes:
        check_same("dtype", "as stored" if keep else target_dtype.name)
        # A weight has one layout on all processes.
        check_same("C++ kernels", str((keep or quantize is not None) and native.instructions()))
        check_same("quantize", repr(quantize))
    paths = [source.spec.path for source in found if source.spec.in_dims and "routes" not in source.spec.dims]
    schemes = {} if quantize is None else uncalibrated(chosen_schemes(quantize, paths, checkpoint.config))

    def read(source: Source) -> AbstractWeight | jax.Array:
        if source.spec.path in schemes:
            return _quantized(source, placement, check, schemes[source.spec.path])
        kept = read_packed(source, placement) if keep else None
        if kept is not None and check:
            # The numbers are looked at and not kept.
            source.read(target_dtype, placement.shards(source.spec.dims, source.shape), check=True)
        return _read_dense(source, target_dtype, placement, check) if kept is None else kept

    # Quantizing takes memory, and puts shards on devices in an order that must be that of the other processes.
    weights = _read(found, read, placement, progress, together=not schemes)
    skeleton = _skeleton(checkpoint, target_dtype, strategy)
    return dataclasses.replace(_filled(skeleton, weights), mesh=placement.mesh)


def load_stacked(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh,
    strategy: Strategy,
    chunks: Count = 1,
    dtype: DTypeLike | None = None,
    check: bool = False,
    progress: Progress | None = None,
) -> Stacked:
    """Loads a model with stacked blocks, whose strategy may split `layers` into the stages of a pipeline.

    ```python
    model = mx.load_stacked("path", mesh=mx.make_mesh("pp=4,tp=4"), strategy=mx.HEADS + "layers@pp")
    ```

    Each process reads only the shards of the layers of its own devices' stages, and holds no others. The result is that
    of `mx.shard(mx.nn.stack(mx.load(path, ...), chunks), mesh, strategy)`. The memory of the host holds one stacked
    weight at a time, with as many layers as this process's devices have, or a few small weights.

    **Arguments:**

    - `path`, `check`, `progress`: as for [`mistral_eqx.load`][].
    - `mesh`: the devices of the model.
    - `strategy`: which dimensions are split over which axes of the mesh.
    - `chunks`: the number of chunks of layers of each stage, as for [`mistral_eqx.nn.stack`][].
    - `dtype`: the dtype of all weights; by default the main dtype of the files. Quantized weights are expanded.

    **Returns:** the model. [`mistral_eqx.nn.in_stages`][] makes the one to generate with.

    **Raises:** `ValueError` as `load` does, or if the layers cannot be split into equal stages and chunks.
    """
    mesh = with_auto_axes(mesh)
    placement = Placement(mesh, strategy)
    chunks = checked(chunks, Count, "chunks")
    checkpoint, target_dtype, found = _opened(path, dtype, placement)
    if placement.several_processes:
        check_same("dtype", target_dtype.name)
        check_same("chunks", str(chunks))
    skeleton = eqx.filter_eval_shape(stack, _skeleton(checkpoint, target_dtype, strategy), chunks)
    check_shapes(eqx.filter(skeleton, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)), mesh, strategy)
    read = functools.partial(_read_dense, dtype=target_dtype, placement=placement, check=check)
    weights = _read(_stacked(found, skeleton), read, placement, progress)
    outer = dataclasses.replace(_filled(skeleton.outer, weights), mesh=mesh)
    return dataclasses.replace(skeleton, outer=outer, pattern=_filled(skeleton.pattern, weights))


def _opened(
    path: str | os.PathLike[str], dtype: DTypeLike | None, placement: Placement
) -> tuple[Checkpoint, np.dtype, list[Source]]:
    """Opens a checkpoint on all processes; returns it, the dtype of the model's floats, and where its tensors are."""
    if placement.several_processes:
        check_same("strategy", placement.strategy.layout)
        check_same("mesh", placement.devices)

    def prepare() -> tuple[Checkpoint, np.dtype, list[Source]]:
        checkpoint = open_checkpoint(locate(path))
        target_dtype = checkpoint.dtype if dtype is None else supported_dtype(dtype)
        if placement.mesh is not None:
            placement.strategy.check(checkpoint.config, placement.mesh)
        return checkpoint, target_dtype, sources(checkpoint, placement)

    def summary(prepared: tuple[Checkpoint, np.dtype, list[Source]]) -> str:
        return fingerprint(prepared[0])

    return run_on_all("checkpoint", prepare, placement.several_processes, summary)


def _skeleton(checkpoint: Checkpoint, dtype: np.dtype, strategy: Strategy) -> Mistral:
    """The model with shapes in place of arrays."""
    return eqx.filter_eval_shape(Mistral.init, checkpoint.config, key=jr.key(0), dtype=dtype, strategy=strategy)


def _stacked(found: Sequence[Source], skeleton: Stacked) -> list[Source | SourceOfLayers]:
    """The sources of a stacked model's arrays: those of `outer` and those of `pattern`, by their paths there."""
    by_path = {source.spec.path: source for source in found}
    stacked: list[SourceOfLayers] = []
    for number, block in enumerate(skeleton.pattern):
        nodes = jax.tree_util.tree_flatten_with_path(block, is_leaf=is_weight)[0]
        for path in (layer_path(keys) for keys, node in nodes if is_weight(node)):
            layers = [by_path.pop(f"blocks.{layer}.{path}") for layer in skeleton.layers(number)]
            stacked.append(SourceOfLayers(f"{number}.{path}", layers))
    return [*by_path.values(), *stacked]


def _read(
    found: Sequence[Found],
    read: Callable[[Found], AbstractWeight | jax.Array],
    placement: Placement,
    progress: Progress | None,
    together: bool = True,
) -> dict[str, AbstractWeight | jax.Array]:
    """Reads the shards of this process's devices, and returns the weight of each layer by the layer's path.

    **Arguments:**

    - `read`: reads one of `found`, and puts it on the devices.
    - `together`: whether several are read at the same time.
    """
    sizes = [_bytes_here(source, placement) for source in found]

    def run() -> dict[str, AbstractWeight | jax.Array]:
        weights: dict[str, AbstractWeight | jax.Array] = {}
        done = 0
        with ThreadPoolExecutor(READS) as pool:
            for group in _groups(sizes):
                each = (pool.map if together else map)(read, [found[number] for number in group])
                for number, weight in zip(group, each, strict=True):
                    weights[found[number].spec.path] = weight
                    done += sizes[number]
                    if progress is not None:
                        progress(done, sum(sizes))
        return weights

    return run_on_all("content of the checkpoint", run, placement.several_processes)


def _groups(sizes: list[int]) -> Iterator[range]:
    """The tensors that are read at the same time: consecutive ones of at most `TOGETHER` bytes, or one."""
    first, total = 0, 0
    for number, size in enumerate(sizes):
        if number > first and total + size > TOGETHER:
            yield range(first, number)
            first, total = number, 0
        total += size
    yield range(first, len(sizes))


def _read_dense(
    source: Source | SourceOfLayers, dtype: np.dtype, placement: Placement, check: bool
) -> DenseWeight | jax.Array:
    spec, read = source.spec, functools.partial(source.read, dtype, check=check)
    array = placement.put(spec.dims, source.shape, dtype, read)
    return DenseWeight(array) if spec.in_dims else array


def _quantized(source: Source, placement: Placement, check: bool, scheme: AbstractScheme) -> AbstractWeight:
    """Reads a whole weight and quantizes it; its shards then go to the devices."""
    spec, mesh, strategy = source.spec, placement.mesh, placement.strategy
    [numbers] = source.read(np.dtype(np.float32), check=check)
    weight = scheme.weight(numbers, Layer.of(spec.path, spec.out_dims, mesh, strategy))
    if mesh is None:
        return weight
    return put_named(weight, spec.path, weight.dims(spec.in_dims, spec.out_dims), mesh, strategy)


def _bytes_here(source: Source | SourceOfLayers, placement: Placement) -> int:
    return source.nbytes * placement.entries(source.spec.dims, source.shape) // math.prod(source.shape)


def supported_dtype(dtype: DTypeLike) -> np.dtype:
    """Converts a name or a type to one of the dtypes of weights.

    **Raises:** `ValueError` if weights cannot have this dtype.
    """
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in DTYPES:
        raise InputError(f"Weights cannot be loaded as {name!r}; the supported dtypes are {', '.join(DTYPES)}.")
    return DTYPES[name]


def layer_path(keys: KeyPath) -> str:
    """The path of a layer in the form of `LayerSpec.path`, such as `blocks.0.attention_norm`.

    **Arguments:**

    - `keys`: the path of the layer's weight, or of an array in it.
    """
    path = jax.tree_util.keystr(keys, simple=True, separator=".")
    return f"{path}.".partition(".weight.")[0]


def is_weight(node: Any) -> bool:
    """Whether a node of a model is a layer's weight; a norm has an array, and in a skeleton the shape of one."""
    return isinstance(node, AbstractWeight | jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _filled(skeleton: Tree, weights: dict[str, AbstractWeight | jax.Array]) -> Tree:
    """Replaces the weight of each layer in the skeleton; other leaves stay."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, node: weights[layer_path(keys)] if is_weight(node) else node, skeleton, is_leaf=is_weight
    )
