"""Folders of adapters as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..config import MistralConfig
from ..errors import InputError
from ..lora import LoRAWeight, TrainedWeight, adapt, shapes_of, sites
from ..nn import Mistral
from ..parallel import everywhere
from . import safetensors
from .files import read_json
from .finite import all_finite
from .loading import supported_dtype
from .names import EMBEDDING, Row, rows
from .processes import on_all
from .reader import LazyTensor, read_rows
from .source import file_order
from .staging import naming, staged


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# What makes an adapter compute something else than `B A x`, or train something else. Absent or empty it does not.
_CHANGES = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Ways to begin that leave the weights below as they are.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_lora(
    model: Mistral,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Writes a model's adapters, and nothing else of it, to a folder that PEFT loads.

    **Arguments:**

    - `model`: a model with adapters, on one device or on a mesh. If it is split over several processes, all of them
        call this, and the first one writes.
    - `folder`: appears when it is complete.
    - `base`: the name or path of the model below, which PEFT's `AutoPeftModel` loads on its own.
    - `overwrite`: whether adapters that already stand there are replaced, with all files of that folder.
    - `allow_nonfinite`: whether adapters that are NaN or infinite are written too.

    **Raises:** `ValueError` if there are no adapters, if they are of a kind that such a folder cannot tell or are not
    finite, or if the folder may not or cannot be written.
    """
    found = {path: site.weight for path, site in sites(model).items() if isinstance(site.weight, LoRAWeight)}
    if not found:
        raise InputError("The model has no adapters to save; put some into it with apply_lora, or save all of it.")
    _check_alike(model, found)
    first = next(iter(found.values()))
    order = {_site(row): row for row in rows(model.config)}
    tensors = [
        tensor
        for path, weight in found.items()
        for tensor in _file_tensors(order[path], model.config, everywhere(weight.a.value), everywhere(weight.b.value))
    ]
    for name, _, _, array in tensors:
        if not allow_nonfinite and not all_finite(array):
            raise InputError(
                f"The adapter's tensor {name!r} holds NaN or infinity, so nothing was saved; go back to adapters from "
                "before they diverged, or write them as they are (allow_nonfinite=True).",
                key=name,
            )
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": int(first.alpha) if float(first.alpha).is_integer() else first.alpha,
        "use_rslora": first.use_rslora,
        "target_modules": sorted({_module(order[path]) for path in found}),
        "lora_dropout": first.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    described = [(name, shape, dtype, iter([array])) for name, shape, dtype, array in tensors]
    several = not all(weight.a.value.is_fully_addressable for weight in found.values())

    def write():
        if jax.process_index() == 0:
            with staged(folder, overwrite=overwrite, what="PEFT adapter") as place:
                with naming(place / WEIGHTS):
                    safetensors.write(place / WEIGHTS, described)
                with naming(place / CONFIG):
                    (place / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    on_all("saved adapters", write, several)


def load_lora(model: Mistral, folder: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Mistral:
    """Puts the adapters of a folder of PEFT beside a model's weights.

    **Arguments:**

    - `model`: the model that they were trained for, on one device or on a mesh.
    - `folder`: holds `adapter_config.json` and `adapter_model.safetensors`.
    - `dtype`: of the adapters.

    **Returns:** the model with adapters, as [`mistral_eqx.apply_lora`][] makes it.

    **Raises:** `ValueError` that names what is wrong: a file, a tensor that the model has no place for, or a kind of
    adapter that is not supported.
    """
    folder = Path(folder).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"The folder {str(folder)!r} has no {name!r}; give one to which PEFT saved adapters.")
    settings = read_json(folder / CONFIG)
    rank, alpha, dropout = _read_settings(settings, folder / CONFIG)
    tensors = safetensors.read_header(folder / WEIGHTS)
    places, wanted = sites(model), supported_dtype(dtype)
    adapters: dict[str, tuple[jax.Array, jax.Array]] = {}
    for row in rows(model.config):
        names = _names(row)
        path = _site(row)
        if row is EMBEDDING or path not in places or not tensors.keys() & set(names):
            continue
        inputs, outputs = shapes_of(places[path])
        sizes = (rank, int(np.prod(inputs))), (int(np.prod(outputs)), rank)
        a, b = (_expected(tensors.pop(name, None), name, size, folder) for name, size in zip(names, sizes, strict=True))
        place = file_order(row, model.config, "hf")
        adapters[path] = (
            jnp.asarray(read_rows(a, wanted).reshape(rank, *inputs)),
            jnp.asarray(read_rows(b, wanted, rows=place).reshape(*outputs, rank)),
        )
    if tensors:
        raise InputError(
            f"{str(folder / WEIGHTS)!r} holds the tensor {next(iter(tensors))!r}, for which the model has no place; "
            "load adapters of linear layers that were trained for this model."
        )
    if not adapters:
        raise InputError(f"{str(folder / WEIGHTS)!r} holds no adapters; give a folder to which PEFT saved some.")
    return adapt(model, adapters, alpha=alpha, dropout=dropout, use_rslora=bool(settings.get("use_rslora")))


def _check_alike(model: Mistral, found: dict[str, LoRAWeight]):
    """Refuses what one folder cannot tell."""
    if isinstance(model.embedding.weight, LoRAWeight | TrainedWeight):
        raise InputError(
            "The embedding has an adapter or was trained as a whole, which a folder of adapters does not hold here; "
            "merge the adapters and save the model."
        )
    kinds = {(weight.rank, weight.alpha, weight.use_rslora, weight.dropout) for weight in found.values()}
    if len(kinds) > 1:
        raise InputError(
            f"The adapters differ in rank, alpha, scaling or dropout ({', '.join(map(str, sorted(kinds)))}), and one "
            "folder tells but one of each; merge the adapters and save the model."
        )
    twice = [path for path, weight in found.items() if isinstance(weight.base, LoRAWeight)]
    if twice:
        raise InputError(
            f"The layer {twice[0]!r} has two adapters, and a folder holds one; merge them and save the model."
        )


def _read_settings(settings: dict[str, Any], path: Path) -> tuple[int, float, float]:
    """The rank, alpha and dropout of adapters, of a kind that is supported."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{str(path)!r} describes adapters of type {kind!r}, but only 'LORA' is read; merge them there."
        )
    for name in _CHANGES:
        if settings.get(name):
            raise InputError(
                f"{str(path)!r} sets {name!r} to {settings[name]!r}, which is not supported; merge the adapters with "
                "PEFT and load the model that this gives."
            )
    if settings.get("bias", "none") != "none":
        raise InputError(
            f"{str(path)!r} trains biases ('bias' is {settings['bias']!r}), but the model has none; train adapters "
            "with 'bias': 'none'."
        )
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        raise InputError(
            f"{str(path)!r} has 'init_lora_weights' {start!r}, which changes the weights below the adapters too; let "
            "PEFT convert them to plain LoRA when it saves."
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise InputError(
            f"{str(path)!r} must tell the rank 'r' and 'lora_alpha' as numbers; it has {rank!r}, {alpha!r}."
        )
    dropout = settings.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(
            f"{str(path)!r} has 'lora_dropout' {dropout!r}; it must be a number from 0 on that is less than 1."
        )
    return rank, float(alpha), float(dropout)


def _expected(tensor: LazyTensor | None, name: str, shape: tuple[int, int], folder: Path) -> LazyTensor:
    if tensor is None:
        raise InputError(f"{str(folder / WEIGHTS)!r} lacks the tensor {name!r}, the other half of an adapter.")
    if tensor.shape != shape:
        raise InputError(
            f"The tensor {name!r} has shape {tensor.shape}, but the rank and the model ask for {shape}; load adapters "
            "that were trained for this model."
        )
    return tensor


def _file_tensors(
    row: Row, config: MistralConfig, a: np.ndarray, b: np.ndarray
) -> list[tuple[str, tuple[int, ...], np.dtype, np.ndarray]]:
    """`A` and `B` as matrices, the rows of `B` in the order of the weight's."""
    a, b = a.reshape(a.shape[0], -1), b.reshape(-1, b.shape[-1])
    b = b[np.argsort(file_order(row, config, "hf"))]
    return [(name, x.shape, x.dtype, x) for name, x in zip(_names(row), (a, b), strict=True)]


def _names(row: Row) -> tuple[str, str]:
    stem = f"base_model.model.{row.hf.removesuffix('.weight')}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _module(row: Row) -> str:
    return row.hf.removesuffix(".weight").rsplit(".", 1)[-1]


def _site(row: Row) -> str:
    return row.path.removesuffix(".weight.value")
