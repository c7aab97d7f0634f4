"""A GGUF file of random weights, as large as is wanted, for benchmarks of memory and of its bandwidth."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rounds import MODEL

import mistral_eqx as mx
from mistral_eqx.checkpoint.gguf_writing import AbstractWeights, Vocabulary, chosen_types, write_gguf
from mistral_eqx.checkpoint.names import LayerSpec
from mistral_eqx.config import MistralConfig
from mistral_eqx.quant import block_format


# How many blocks are drawn for each type: a prime number, so that no two rows of a weight begin alike.
DRAWN = 4093


def write_large(path: Path, layers: int, type: str):
    """Writes layers of Mistral 7B's sizes, the vocabulary of the benchmarks, and an embedding that is also the head."""
    tokenizer = mx.load_tokenizer(MODEL)
    base = mx.PRESETS["7b-v0.3"]
    config = dataclasses.replace(base, vocab=tokenizer.vocab, layers=layers, windows=(None,) * layers, tied=True)
    write_random(path, config, type, tokenizer)


def write_random(path: Path, config: MistralConfig, type: str, tokenizer: Vocabulary):
    """Writes random weights.

    **Arguments:**

    - `type`: the type of all matrices, but for the embedding, which has at least 8 bits.
    - `tokenizer`: the vocabulary, which is not larger than the model's.
    """
    types = chosen_types(config, type, {})
    write_gguf(path, config, _Noise(config), types, tokenizer, type=type, overwrite=False)


@dataclasses.dataclass(frozen=True)
class _Noise(AbstractWeights):
    """A few random blocks, over and over: to quantize all numbers of a large model would take minutes."""

    config: MistralConfig

    def blocks(self, spec: LayerSpec, type: str) -> np.ndarray | None:
        if not spec.in_dims:
            return None
        rows, inputs = spec.file_shape(self.config)
        format = block_format(type)
        return np.resize(_drawn(type), (rows, inputs // format.size * format.nbytes))

    def numbers(self, spec: LayerSpec) -> Iterator[np.ndarray]:
        """Only norms are asked for in floats."""
        yield np.ones(spec.file_shape(self.config), np.float32)


@functools.cache
def _drawn(type: str) -> np.ndarray:
    numbers = np.random.default_rng(0).normal(scale=0.02, size=(DRAWN, block_format(type).size))
    return mx.GGUF(type).blocks(numbers.astype(np.float32))
