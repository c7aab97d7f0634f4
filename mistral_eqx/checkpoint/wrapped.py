"""Folders of models that also see images or hear audio. Their text model is loaded, and the rest is skipped."""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .reader import LazyTensor
from .settings import Settings


# The wrapping model types, and the defaults of transformers for the config of their text model.
_TEXT: dict[str, dict[str, Any]] = {
    "mistral3": {"model_type": "mistral"},
    "voxtral": {
        "model_type": "llama",
        "vocab_size": 131072,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 30,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e8,
        "head_dim": 128,
    },
}
WRAPPERS = tuple(_TEXT)
_SKIPPED = {
    "hf": re.compile(r"(model\.)?(vision_tower|multi_modal_projector|audio_tower)\..+"),
    "mistral": re.compile(r"(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\..+"),
}
# Before and since transformers 5; the head has the first form, or no prefix.
_PREFIX = re.compile(r"^(language_model\.model\.|model\.language_model\.|language_model\.(?=lm_head\.))")


def is_wrapper(settings: Mapping[str, Any]) -> bool:
    """Whether a `config.json` holds the config of a text model beside that of another model."""
    return isinstance(settings, Mapping) and settings.get("model_type") in WRAPPERS


def text_config(settings: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None) -> Mapping[str, Any]:
    """The config of the text model: the table `text_config` of a wrapper, and otherwise the whole `config.json`.

    **Raises:** `InputError` if a wrapper has no such table.
    """
    if not is_wrapper(settings):
        return settings
    text = Settings(settings, "config.json", file).take("text_config", dict[str, Any])
    defaults = _TEXT[settings["model_type"]]
    if "rope_parameters" in text:
        defaults = {key: value for key, value in defaults.items() if key != "rope_theta"}
    quantization = text.get("quantization_config") or settings.get("quantization_config")
    return {**defaults, **text, "quantization_config": quantization}


def text_tensors(tensors: Mapping[str, LazyTensor], format: str) -> dict[str, LazyTensor]:
    """The tensors of the text model, by the names that they have without a wrapper.

    **Arguments:**

    - `tensors`: all tensors by their names in the files.
    - `format`: `"hf"` or `"mistral"`.

    **Raises:** `InputError` if two tensors are the same one of the text model.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if _SKIPPED[format].fullmatch(name):
            continue
        own = _PREFIX.sub("" if "lm_head." in name else "model.", name, count=1) if format == "hf" else name
        if own in found:
            raise InputError(
                f"The tensor {own!r} of the text model has two names in the files, {found[own].name!r} and {name!r}; "
                "remove the file that does not belong there.",
                key=own,
            )
        found[own] = tensor
    return found


def warn_of_skipped(folder: Path):
    """Says that only the text model of a folder is loaded."""
    warnings.warn(
        f"{str(folder)!r} holds a model of images or audio too, which is skipped: only its text model is loaded.",
        stacklevel=2,
    )
