"""Latent attention in GGUF, and the experts beside it: their keys, and the two tensors in place of `kv_b_proj`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import CountOrZero
from ..config import Latent, MistralConfig, Routing, Size
from ..errors import InputError
from ..quant import fitting_type
from ..rope import Magnitude
from .experts import expect_shape
from .gguf_header import shortest
from .names import LayerSpec, layer_specs
from .reader import DTYPES, LazyTensor
from .settings import REQUIRED, Settings


# llama.cpp's name of the models, and that of DeepSeek's, which its converter gives to Large 3.
ARCHITECTURES = ("mistral4", "deepseek2")
_SOFTMAX = 1


class KeyValueTensor(LazyTensor):
    """`kv_b_proj` from the tensors of its keys and its values, in floats.

    **Arguments:**

    - `name`: what the matrix is called.
    - `keys`: shape `(heads, kv_rank, nope_dim)`. Its blocks are of other columns than those of the weight, so that
        they cannot be kept.
    - `values`: shape `(heads, value_dim, kv_rank)`.
    """

    def __init__(self, name: str, keys: LazyTensor, values: LazyTensor):
        heads, rank, nope = keys.shape
        dtype = keys.dtype if keys.dtype == values.dtype else DTYPES["float32"]
        self._expanded = nope + values.shape[1]
        self._keys, self._values = keys, values
        super().__init__(name, (heads * self._expanded, rank), dtype, keys.stored, keys.nbytes + values.nbytes)

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        first, last = start // self._expanded, -(-stop // self._expanded)
        keys, values = (tensor.rows(first, last).astype(self.dtype) for tensor in (self._keys, self._values))
        whole = np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, self.shape[1])
        found = whole[start - first * self._expanded : stop - first * self._expanded]
        return found if columns is None else found[:, columns]


def join_keys_and_values(
    tensors: Mapping[str, LazyTensor], config: MistralConfig, path: Path
) -> Mapping[str, LazyTensor]:
    """The tensors of a file, with one matrix for the keys and values of each layer with latent attention.

    **Raises:** `InputError` that names a tensor of another shape than the config says.
    """
    if config.latent is None:
        return tensors
    joined = dict(tensors)
    for spec in layer_specs(config):
        shapes = _shapes(spec, config)
        # An old file has one tensor, and if only one of both is missing, `sources` says so.
        if shapes and shapes.keys() <= joined.keys():
            keys, values = (expect_shape(joined, name, shape, path) for name, shape in shapes.items())
            joined[spec.name("gguf")] = KeyValueTensor(spec.name("gguf"), keys, values)
            for name in shapes:
                del joined[name]
    return joined


def is_divided(spec: LayerSpec) -> bool:
    """Whether a file has two tensors for this weight."""
    return spec.path.endswith(".kv_b_proj")


def _shapes(spec: LayerSpec, config: MistralConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of keys and of values by their names; empty for another weight."""
    if (latent := config.latent) is None or not is_divided(spec):
        return {}
    keys, values = (spec.name("gguf").replace("attn_kv_b", f"attn_{part}_b") for part in "kv")
    return {
        keys: (config.kv_heads, latent.kv_rank, latent.nope_dim),
        values: (config.kv_heads, latent.value_dim, latent.kv_rank),
    }


def divided_tensors(spec: LayerSpec, config: MistralConfig, kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    """The name, shape and type of the tensors of keys and of values.

    **Arguments:**

    - `kind`: the type of the weight, whose blocks need not divide the rows of the keys.
    """
    return [(name, shape, fitting_type(kind, shape[-1])) for name, shape in _shapes(spec, config).items()]


def divided(numbers: np.ndarray, config: MistralConfig) -> list[np.ndarray]:
    """The keys and the values of `kv_b_proj`, as a file has them.

    **Arguments:**

    - `numbers`: the weight, shape `(kv_heads * expanded, kv_rank)`.
    """
    assert config.latent is not None
    grouped = numbers.reshape(config.kv_heads, config.latent.expanded, config.latent.kv_rank)
    keys, values = np.split(grouped, [config.latent.nope_dim], axis=1)
    return [np.ascontiguousarray(keys.swapaxes(1, 2)), np.ascontiguousarray(values)]


def read_latent(document: Settings, arch: str, heads: int, eps: float, scale: float) -> Latent:
    """Reads the sizes of latent attention.

    A file gives the sizes of the absorbed form too, in which all heads share one key and one value. Old files have the
    other sizes in their place.

    **Arguments:**

    - `document`: the keys and values of the file.
    - `arch`: its architecture, with which the keys begin.
    - `heads`: the number of heads.
    - `eps`: the constant of all norms.
    - `scale`: the factor of the scores.
    """

    def take(name: str) -> int:
        return document.take(f"{arch}.attention.{name}", Size)

    q_rank, kv_rank = take("q_lora_rank"), take("kv_lora_rank")
    rope = document.take(f"{arch}.rope.dimension_count", Size)
    absorbed = document.take(f"{arch}.attention.key_length_mla", Size | None, None) is not None
    end = "_mla" if absorbed else ""
    head, value = take(f"key_length{end}"), take(f"value_length{end}")
    expected = {"head_count_kv": heads}
    if absorbed:
        expected = {"key_length": kv_rank + rope, "value_length": kv_rank, "head_count_kv": 1}
    for name, size in expected.items():
        document.expect(f"{arch}.attention.{name}", (size,), size, Size)
    with document.naming():
        return Latent(q_rank, kv_rank, head - rope, rope, value, eps, scale)


def read_groups(document: Settings, arch: str, routing: Routing | None, layers: int) -> Routing | None:
    """The experts of a model with latent attention.

    **Arguments:**

    - `routing`: the number of experts, and how many compute a token; `None` without experts.
    """

    def take(name: str, kind: Any, default: Any) -> Any:
        value = document.take(f"{arch}.{name}", kind, default)
        return shortest(value) if isinstance(value, float) else value

    document.expect(f"{arch}.expert_gating_func", (_SOFTMAX, None), None)
    found = {
        "hidden": take("expert_feed_forward_length", Size, REQUIRED),
        "shared": take("expert_shared_count", CountOrZero, REQUIRED),
        "first_dense": take("leading_dense_block_count", CountOrZero, 0),
        "groups": take("expert_group_count", CountOrZero, 1) or 1,
        "groups_per_token": take("expert_group_used_count", CountOrZero, 1) or 1,
        # A scale of 0 stands for none.
        "scale": take("expert_weights_scale", Magnitude, 1.0) if take("expert_weights_scale", float, 0.0) else 1.0,
        "normalized": take("expert_weights_norm", bool, False),
    }
    if routing is None or found["first_dense"] >= layers:
        return None
    with document.naming():
        return dataclasses.replace(routing, **found)


def write_latent(config: MistralConfig, latent: Latent) -> dict[str, Any]:
    """The keys of latent attention and of the experts beside it, without the architecture.

    **Raises:** `InputError` if llama.cpp would compute another model.
    """
    if latent.eps != config.norm_eps:
        raise InputError(
            f"The norms of the latent attention have an eps of {latent.eps} and the other norms {config.norm_eps}, but "
            "a GGUF file can hold one for both; use the format 'hf' or 'mistral'.",
            key="eps",
        )
    routing = config.routing
    if routing is not None and not routing.shared:
        raise InputError(
            "A GGUF file with latent attention must have shared experts, and the model has none; use the format "
            "'mistral'.",
            key="routing",
        )
    found: dict[str, Any] = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": latent.q_rank,
        "attention.kv_lora_rank": latent.kv_rank,
        "attention.key_length": latent.cached,
        "attention.value_length": latent.kv_rank,
        "attention.key_length_mla": config.head_dim,
        "attention.value_length_mla": latent.value_dim,
        "rope.dimension_count": latent.rope_dim,
        "leading_dense_block_count": config.dense_layers,
        "expert_feed_forward_length": config.expert_hidden,
        "expert_shared_count": 0 if routing is None else routing.shared,
    }
    if routing is not None:
        found |= {
            "expert_weights_scale": float(routing.scale),
            "expert_weights_norm": routing.normalized,
            "expert_gating_func": _SOFTMAX,
        }
        # llama.cpp has no groups that all are chosen, which change nothing.
        if routing.groups_per_token < routing.groups:
            found |= {
                "expert_group_count": routing.groups,
                "expert_group_used_count": routing.groups_per_token,
            }
    return found
