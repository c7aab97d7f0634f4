"""Adapter folders in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..checks import Count, Positive, ShareBelowOne, checked
from ..config import MistralConfig
from ..documents import read_json, shown, to_path
from ..errors import InputError
from ..lora import AdaptableLayer, LoRAWeight, TrainedWeight, adapt, adaptable_layers, quantizable_layers, shapes_of
from ..nn import Mistral
from ..nn.layers import map_layers
from ..parallel import gather_to_host
from . import safetensors
from .finite import all_finite
from .loading import supported_dtype
from .names import EMBEDDING, HEAD, LayerSpec, layer_specs
from .opening import ADAPTER
from .processes import run_on_all
from .pth import read_pickle
from .reader import LazyTensor, read_rows
from .source import file_order
from .staging import naming, staged
from .weight_files import same_values


CONFIG = ADAPTER
WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"

# Keys that change what an adapter computes or trains, unless they are absent or empty.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
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
# Initialisations that do not change the base weights.
_Initialisation = bool | Literal["gaussian", "eva", "orthogonal"] | None
# Layers that PEFT saves whole if they were trained or have an adapter of their own.
_TABLES = {"embed_tokens": EMBEDDING, "lm_head": HEAD}


def save_lora(
    model: Mistral,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Writes the adapters of a model, without its other weights, to a folder that PEFT loads.

    **Arguments:**

    - `model`: a model with adapters, on one device or on a mesh. If it is sharded over several processes, all of them
        must call this function, and process 0 writes.
    - `folder`: the folder to write. It appears when all of its files are complete.
    - `base`: the name or path of the base model, which PEFT's `AutoPeftModel` loads.
    - `overwrite`: whether to replace an existing folder of adapters, with all its files.
    - `allow_nonfinite`: whether to write adapters with NaN or infinity.

    **Raises:** `ValueError` if the model has no adapters, if the format cannot express them, if they have NaN or
    infinity, or if the folder may not or cannot be written.
    """
    found = {
        path: layer.weight for path, layer in quantizable_layers(model).items() if isinstance(layer.weight, LoRAWeight)
    }
    if not found:
        raise InputError("The model has no adapters to save; add adapters with apply_lora, or save the whole model.")
    _check_expressible(model, found)
    first = next(iter(found.values()))
    specs = {spec.path: spec for spec in layer_specs(model.config)}
    tensors = [
        tensor
        for path, weight in found.items()
        for tensor in _file_tensors(
            specs[path], model.config, gather_to_host(weight.a.value), gather_to_host(weight.b.value)
        )
    ]
    for name, _, _, array in tensors:
        if not allow_nonfinite and not all_finite(array):
            raise InputError(
                f"The adapter's tensor {name!r} holds NaN or infinity, so nothing was saved; use adapters from "
                "before they diverged, or save them as they are (allow_nonfinite=True).",
                key=name,
            )
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": int(first.alpha) if float(first.alpha).is_integer() else first.alpha,
        "use_rslora": first.use_rslora,
        "target_modules": sorted({_module(specs[path]) for path in found}),
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
            with staged(folder, overwrite=overwrite, kind="PEFT adapter") as staging:
                with naming(staging / WEIGHTS):
                    safetensors.write(staging / WEIGHTS, described)
                with naming(staging / CONFIG):
                    (staging / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    run_on_all("saved adapters", write, several)


def adapter_folder(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder of adapters.

    **Raises:** `InputError` if it does not have both files of PEFT.
    """
    folder = to_path(folder, "The folder of adapters")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(
                f"The folder {str(folder)!r} has no {name!r}; give a folder of adapters saved by PEFT.", file=folder
            )
    return folder


def load_lora(model: Mistral, folder: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Mistral:
    """Adds the adapters of a PEFT folder to a model.

    **Arguments:**

    - `model`: the model that the adapters were trained for, on one device or on a mesh.
    - `folder`: the folder with `adapter_config.json` and `adapter_model.safetensors`.
    - `dtype`: the dtype of the adapters, and of an embedding table or a head that was trained as a whole.

    **Returns:** the model with adapters, as from [`mistral_eqx.apply_lora`][]. An embedding table or a head in the
    folder replaces the model's.

    **Raises:** `InputError` that names a missing or damaged file, an unsupported key, or a tensor that the model does
    not have.
    """
    folder = adapter_folder(folder)
    settings = _read_settings(folder / CONFIG)
    rank, target_dtype = settings.rank, supported_dtype(dtype)
    tensors = safetensors.read_header(folder / WEIGHTS)
    _check_pickle(folder, tensors)
    model = _with_tables(model, tensors, settings, target_dtype, folder)
    layers = quantizable_layers(model)
    adapters: dict[str, tuple[jax.Array, jax.Array]] = {}
    for spec in layer_specs(model.config):
        each, path = _each(spec, model.config), spec.path
        names = {name for one in each for name in _names(one)}
        if spec is EMBEDDING or path not in layers or not tensors.keys() & names:
            continue
        stack, inputs, outputs = shapes_of(layers[path])
        sizes = (rank, int(np.prod(inputs))), (int(np.prod(outputs)), rank)
        found = []
        for one in each:
            settings.expect_target(one, folder / CONFIG)
            a, b = (
                _expected(tensors.pop(name, None), name, size, folder)
                for name, size in zip(_names(one), sizes, strict=True)
            )
            order = file_order(one, model.config, "hf")
            found.append((read_rows(a, target_dtype), read_rows(b, target_dtype, rows=order)))
        a, b = (np.stack(half) for half in zip(*found, strict=True))
        adapters[path] = (
            jnp.asarray(a.reshape(*stack, rank, *inputs)),
            jnp.asarray(b.reshape(*stack, *outputs, rank)),
        )
    if tensors:
        raise InputError(
            f"{str(folder / WEIGHTS)!r} holds the tensor {shown(next(iter(tensors)))}, which the model does not "
            "have; load adapters of linear layers that were trained for this model.",
            file=folder / WEIGHTS,
            key=next(iter(tensors)),
        )
    if not adapters:
        raise InputError(
            f"{str(folder / WEIGHTS)!r} holds no adapters; give a folder of adapters saved by PEFT.",
            file=folder / WEIGHTS,
        )
    return adapt(model, adapters, alpha=settings.alpha, dropout=settings.dropout, use_rslora=settings.use_rslora)


def _check_expressible(model: Mistral, found: dict[str, LoRAWeight]):
    """Refuses adapters that the format cannot express."""
    for path, layer in quantizable_layers(model).items():
        weight = layer.weight.base if isinstance(layer.weight, LoRAWeight) else layer.weight
        if isinstance(weight, TrainedWeight) or (path == "embedding" and isinstance(layer.weight, LoRAWeight)):
            raise InputError(
                f"The {path} has an adapter or was trained as a whole, which save_lora does not support; "
                "merge the adapters and save the model."
            )
    kinds = {(weight.rank, weight.alpha, weight.use_rslora, weight.dropout) for weight in found.values()}
    if len(kinds) > 1:
        raise InputError(
            f"The adapters differ in rank, alpha, scaling or dropout ({', '.join(map(str, sorted(kinds)))}), and one "
            "folder has one value of each; merge the adapters and save the model."
        )
    twice = [path for path, weight in found.items() if isinstance(weight.base, LoRAWeight)]
    if twice:
        raise InputError(
            f"The layer {twice[0]!r} has two adapters, but a folder holds one for each layer; merge them and "
            "save the model."
        )


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The supported settings of a folder of adapters."""

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    targets: str | list[str] | None
    tables: list[str]

    def expect_target(self, spec: LayerSpec, path: Path):
        """Refuses an adapter whose layer is not a target, because PEFT would ignore the adapter."""
        layer, targets = spec.hf, self.targets
        if isinstance(targets, str):
            # A regular expression from a file may run forever, so only a plain name is matched.
            matches = re.fullmatch(r"[\w.-]+", targets) is None or targets in (layer, "all-linear")
        else:
            matches = targets is None or any(f".{layer}".endswith(f".{target}") for target in targets)
        if not matches:
            raise InputError(
                f"{str(path)!r} has 'target_modules' {shown(targets)}, but the weights hold an adapter of {layer!r}; "
                "fetch both again together.",
                file=path,
                key="target_modules",
            )


def _read_settings(path: Path) -> _Settings:
    settings = read_json(path)

    def setting(key: str, kind: Any, default: Any = None) -> Any:
        value = settings.get(key, default)
        return checked(value, kind, f"{str(path)!r} has {key!r}, which", file=path, key=key, remedy="correct it there")

    if (kind := settings.get("peft_type")) != "LORA":
        raise InputError(
            f"{str(path)!r} has 'peft_type' {shown(kind)}, but only 'LORA' is supported; merge the adapters with PEFT.",
            file=path,
            key="peft_type",
        )
    for name in _UNSUPPORTED:
        value = settings.get(name)
        if not (value is None or value is False or (isinstance(value, str | list | dict) and not value)):
            raise InputError(
                f"{str(path)!r} sets {name!r} to {shown(value)}, which is not supported; merge the adapters with "
                "PEFT and load the merged model.",
                file=path,
                key=name,
            )
    if settings.get("bias", "none") != "none":
        raise InputError(
            f"{str(path)!r} trains biases ('bias' is {shown(settings['bias'])}), but the model has none; train "
            "adapters with 'bias': 'none'.",
            file=path,
            key="bias",
        )
    checked(
        settings.get("init_lora_weights", True),
        _Initialisation,
        f"{str(path)!r} has 'init_lora_weights', which",
        file=path,
        key="init_lora_weights",
        remedy="let PEFT convert the adapters to plain LoRA when it saves",
    )
    tables = setting("modules_to_save", list[str] | None) or []
    if unknown := [name for name in tables if name not in _TABLES]:
        raise InputError(
            f"{str(path)!r} has {shown(unknown[0])} in 'modules_to_save', but only {', '.join(_TABLES)} are "
            "supported; merge the adapters with PEFT and load the merged model.",
            file=path,
            key="modules_to_save",
        )
    for key in ("base_model_name_or_path", "task_type"):
        setting(key, str | None)
    return _Settings(
        rank=setting("r", Count),
        alpha=setting("lora_alpha", Positive),
        dropout=setting("lora_dropout", ShareBelowOne, 0.0),
        use_rslora=setting("use_rslora", bool, False),
        targets=setting("target_modules", str | list[str] | None),
        tables=tables,
    )


def _check_pickle(folder: Path, tensors: dict[str, LazyTensor]):
    """Refuses a pickle that differs from the safetensors file in the same folder."""
    pickled = folder / _PICKLED
    if not pickled.exists():
        return
    try:
        copies = read_pickle(pickled)
        if copies.keys() == tensors.keys() and all(same_values(tensors[name], copies[name]) for name in copies):
            return
        reason = "differ"
    except InputError as error:
        reason = f"cannot be compared ({str(error).rstrip('.')})"
    raise InputError(
        f"The folder {str(folder)!r} holds adapters in {WEIGHTS!r} and in {_PICKLED!r}, which {reason}; remove "
        "the file that does not belong there.",
        file=pickled,
    )


def _with_tables(
    model: Mistral, tensors: dict[str, LazyTensor], settings: _Settings, dtype: np.dtype, folder: Path
) -> Mistral:
    """The model with the embedding table and the head of the folder. Their tensors are removed from `tensors`."""
    layers = adaptable_layers(model)
    changed: dict[str, TrainedWeight] = {}
    for module, spec in _TABLES.items():
        stem = f"base_model.model.{spec.hf}"
        names = [name for name in (f"{stem}.weight", f"{stem}.base_layer.weight") if name in tensors]
        if module in settings.tables and f"{stem}.weight" not in names:
            raise InputError(
                f"{str(folder / CONFIG)!r} has {module!r} in 'modules_to_save', but {WEIGHTS!r} lacks the tensor "
                f"'{stem}.weight'; fetch both again.",
                file=folder / CONFIG,
                key="modules_to_save",
            )
        for name in names:
            tensor = _expected(tensors.pop(name), name, spec.file_shape(model.config), folder)
            # The head of a tied model is the embedding table.
            path = (EMBEDDING if model.config.tied else spec).path
            table = read_rows(tensor, np.dtype(model.dtype))
            current = (
                np.asarray(changed[path].value) if path in changed else gather_to_host(layers[path].weight.dense())
            )
            if np.array_equal(current.astype(table.dtype), table):
                continue
            if path in changed or (model.config.tied and spec is HEAD):
                raise InputError(
                    f"The tensor {name!r} of {str(folder / WEIGHTS)!r} differs from the embedding, but in this model "
                    "the head is the embedding table; merge the adapters with PEFT.",
                    file=folder / WEIGHTS,
                    key=name,
                )
            stored = table if name.endswith(".base_layer.weight") else read_rows(tensor, dtype)
            changed[path] = TrainedWeight(jnp.asarray(stored), np.dtype(model.dtype))

    def replaced(path: str, layer: AdaptableLayer) -> AdaptableLayer:
        return dataclasses.replace(layer, weight=changed[path]) if path in changed else layer

    return map_layers(replaced, model) if changed else model


def _expected(tensor: LazyTensor | None, name: str, shape: tuple[int, ...], folder: Path) -> LazyTensor:
    if tensor is None:
        raise InputError(
            f"{str(folder / WEIGHTS)!r} lacks the tensor {name!r}, the other half of an adapter; fetch it again.",
            file=folder / WEIGHTS,
            key=name,
        )
    if tensor.shape != shape:
        raise InputError(
            f"The tensor {name!r} of {str(folder / WEIGHTS)!r} has shape {shown(tensor.shape)}, but the rank and "
            f"the model require {shape}; load adapters that were trained for this model.",
            file=folder / WEIGHTS,
            key=name,
        )
    return tensor


def _file_tensors(
    spec: LayerSpec, config: MistralConfig, a: np.ndarray, b: np.ndarray
) -> list[tuple[str, tuple[int, ...], np.dtype, np.ndarray]]:
    """`A` and `B` as matrices, of each expert. The rows of `B` have the order of the rows of the weight in the file."""
    each, rank = _each(spec, config), b.shape[-1]
    a, b = a.reshape(len(each), rank, -1), b.reshape(len(each), -1, rank)
    pairs = [(one, (a[at], b[at][np.argsort(file_order(one, config, "hf"))])) for at, one in enumerate(each)]
    return [(name, x.shape, x.dtype, x) for one, pair in pairs for name, x in zip(_names(one), pair, strict=True)]


def _each(spec: LayerSpec, config: MistralConfig) -> list[LayerSpec]:
    """The spec itself, or that of each expert, which is a linear layer of its own in PEFT."""
    if "*" not in spec.hf:
        return [spec]
    (out_dims,) = spec.out_dims.split()[1:]
    return [
        dataclasses.replace(spec, hf=spec.hf.replace("*", str(expert)), out_dims=out_dims)
        for expert in range(config.experts)
    ]


def _names(spec: LayerSpec) -> tuple[str, str]:
    stem = f"base_model.model.{spec.hf}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _module(spec: LayerSpec) -> str:
    return spec.hf.rsplit(".", 1)[-1]
