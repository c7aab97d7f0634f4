"""From a checkpoint to a model on its device."""

import os
from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from ..nn import Mistral
from ..nn.rotary import Rotary
from .hub import locate
from .opening import open_checkpoint
from .reader import DTYPES
from .source import sources


Progress = Callable[[int, int], None]


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    check: bool = False,
    progress: Progress | None = None,
) -> Mistral:
    """Loads a model, one tensor at a time from its file to the device, cast on the way.

    **Arguments:**

    - `path`: a folder of Hugging Face, a folder as Mistral releases it, a `.gguf` file, or a name that
        [`mistral_eqx.checkpoint.locate`][] finds.
    - `dtype`: of all weights: `"float32"`, `"bfloat16"` or `"float16"`; the files' own unless given, and float32 for
        quantised files.
    - `check`: whether every weight is looked at, and NaN and infinity are refused.
    - `progress`: called after each tensor with the bytes read so far and those there are in all.

    **Returns:** the model.

    **Raises:** `ValueError` that names what is wrong: the file, the key of the config, or the tensor.
    """
    checkpoint = open_checkpoint(locate(path))
    wanted = checkpoint.dtype if dtype is None else supported_dtype(dtype)
    found = sources(checkpoint)
    total, done = sum(source.tensor.nbytes for source in found), 0
    arrays: dict[str, jax.Array] = {}
    for source in found:
        array = source.read(wanted, check=check)
        # Waiting keeps no more than one tensor on its way to the device.
        arrays[source.row.path] = jax.block_until_ready(jax.device_put(array))
        done += source.tensor.nbytes
        if progress is not None:
            progress(done, total)
    config = checkpoint.config
    skeleton = eqx.filter_eval_shape(Mistral.init, config, key=jr.key(0), dtype=wanted)
    skeleton = eqx.tree_at(lambda model: model.rotary, skeleton, Rotary.init(config.head_dim, config.rope_theta))
    return _filled(skeleton, arrays)


def supported_dtype(dtype: DTypeLike) -> np.dtype:
    """A dtype that weights may have, from its name or its type.

    **Raises:** `ValueError` if weights cannot have it.
    """
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in DTYPES:
        raise ValueError(f"Weights cannot be loaded as {name!r}; the supported dtypes are {', '.join(DTYPES)}.")
    return DTYPES[name]


def path_of(keys: KeyPath) -> str:
    """The place of a leaf in the model, as the table of names spells it: `blocks.0.attention_norm.weight`."""
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def _filled(skeleton: Mistral, arrays: dict[str, jax.Array]) -> Mistral:
    """Puts each array in the place that its path names; leaves that are no shapes stay."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(skeleton)
    filled = [arrays[path_of(keys)] if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for keys, leaf in leaves]
    return jax.tree_util.tree_unflatten(structure, filled)
