"""Loads a model from a checkpoint onto its devices."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from ..errors import InputError
from ..nn import AbstractWeight, DenseWeight, Mistral
from ..nn.kernels import native
from ..parallel import SINGLE, Strategy, check_same, put_named, with_auto_axes
from ..quant import AbstractScheme, Layer, Recipe, chosen_schemes, uncalibrated
from .hub import locate
from .opening import open_checkpoint
from .packed import read_packed
from .placement import Placement
from .processes import fingerprint, run_on_all
from .reader import DTYPES, READS, Checkpoint
from .source import Source, sources


Progress = Callable[[int, int], None]

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
    mesh = None if mesh is None else with_auto_axes(mesh)
    placement = Placement(mesh, strategy)
    if placement.several_processes:
        check_same("strategy", strategy.layout)
        check_same("mesh", placement.devices)

    def prepare() -> tuple[Checkpoint, np.dtype, list[Source]]:
        checkpoint = open_checkpoint(locate(path))
        target_dtype = checkpoint.dtype if dtype is None else supported_dtype(dtype)
        if mesh is not None:
            strategy.check(checkpoint.config, mesh)
        return checkpoint, target_dtype, sources(checkpoint, placement)

    def summary(prepared: tuple[Checkpoint, np.dtype, list[Source]]) -> str:
        return fingerprint(prepared[0])

    checkpoint, target_dtype, found = run_on_all("checkpoint", prepare, placement.several_processes, summary)
    keep = dtype is None and any(source.tensor.packed is not None for source in found)
    if placement.several_processes:
        check_same("dtype", "as stored" if keep else target_dtype.name)
        # A weight has one layout on all processes.
        check_same("C++ kernels", str((keep or quantize is not None) and native.instructions()))
        check_same("quantize", repr(quantize))
    paths = [source.spec.path for source in found if source.spec.in_dims and "routes" not in source.spec.dims]
    schemes = {} if quantize is None else uncalibrated(chosen_schemes(quantize, paths, checkpoint.config))
    read = functools.partial(_read, found, target_dtype, placement, check, progress, keep, schemes)
    weights = run_on_all("content of the checkpoint", read, placement.several_processes)
    skeleton = eqx.filter_eval_shape(
        Mistral.init, checkpoint.config, key=jr.key(0), dtype=target_dtype, strategy=strategy
    )
    return dataclasses.replace(_filled(skeleton, weights), mesh=mesh)


def _read(
    found: list[Source],
    dtype: np.dtype,
    placement: Placement,
    check: bool,
    progress: Progress | None,
    keep: bool,
    schemes: Mapping[str, AbstractScheme],
) -> dict[str, AbstractWeight | jax.Array]:
    """Reads the shards of this process's devices, and returns the weight of each layer by the layer's path."""

    def read(source: Source) -> AbstractWeight | jax.Array:
        path = source.spec.path
        if path in schemes:
            return _quantized(source, placement, check, schemes[path])
        kept = read_packed(source, placement) if keep else None
        if kept is not None and check:
            # The numbers are looked at and not kept.
            source.read(dtype, placement.shards(source.spec.dims, source.shape), check=True)
        return _read_dense(source, dtype, placement, check) if kept is None else kept

    sizes = [_bytes_here(source, placement) for source in found]
    weights: dict[str, AbstractWeight | jax.Array] = {}
    done = 0
    with ThreadPoolExecutor(READS) as pool:
        # Quantizing takes memory, and puts shards on devices in an order that must be that of the other processes.
        each = map if schemes else pool.map
        for group in _groups(sizes):
            for number, weight in zip(group, each(read, [found[number] for number in group]), strict=True):
                weights[found[number].spec.path] = weight
                done += sizes[number]
                if progress is not None:
                    progress(done, sum(sizes))
    return weights


def _groups(sizes: list[int]) -> Iterator[range]:
    """The tensors that are read at the same time: consecutive ones of at most `TOGETHER` bytes, or one."""
    first, total = 0, 0
    for number, size in enumerate(sizes):
        if number > first and total + size > TOGETHER:
            yield range(first, number)
            first, total = number, 0
        total += size
    yield range(first, len(sizes))


def _read_dense(source: Source, dtype: np.dtype, placement: Placement, check: bool) -> DenseWeight | jax.Array:
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


def _bytes_here(source: Source, placement: Placement) -> int:
    shape = source.spec.shape(source.config)
    return source.tensor.nbytes * placement.entries(source.spec.dims, shape) // math.prod(shape)


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


def _filled(skeleton: Mistral, weights: dict[str, AbstractWeight | jax.Array]) -> Mistral:
    """Replaces the weight of each layer in the skeleton; other leaves stay."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, node: weights[layer_path(keys)] if is_weight(node) else node, skeleton, is_leaf=is_weight
    )
