"""Quantization to the types of GGUF whose scales are searched: the codes are those of ggml."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from fixtures import llama_quantize

import mistral_eqx as mx
from mistral_eqx.quant.k_types import K_TYPES


def numbers_of_all_kinds():
    """Rows of 1024 numbers: near and far from normal, rounded so that some tie, and with zeros of all lengths."""
    random = np.random.default_rng(0)
    normal = random.normal(size=(16, 1024))
    bfloat16 = normal.astype(ml_dtypes.bfloat16).astype(np.float32)
    rows = [normal, normal**3, bfloat16, np.abs(normal), -np.abs(normal), 1e-8 * normal, normal.round(), 3 + normal]
    rows += [np.where(np.arange(1024) // size % 2, normal, 0) for size in (1, 16, 32, 256)]
    rows += [np.full((1, 1024), value) for value in (0, 0.5, -0.5)]
    rows += [np.sign(normal) * 10.0 ** (4 * normal - 16)]
    return np.concatenate(rows).astype(np.float32)


def blocks(kind, numbers):
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return mx.GGUF(kind).blocks(numbers.reshape(-1, size)).reshape(-1, nbytes)


def errors(kind, found, numbers):
    """The squared error of each block, by the numbers that the package gguf reads."""
    read = gguf.quants.dequantize(found, gguf.GGMLQuantizationType[kind]).astype(np.float64)
    return np.square(read - numbers.reshape(read.shape)).sum(axis=1)


@pytest.mark.parity
@pytest.mark.parametrize("kind", [*K_TYPES, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_codes_are_those_of_ggml(kind):
    numbers = numbers_of_all_kinds()
    ours, theirs = blocks(kind, numbers), llama_quantize.blocks(kind, numbers)
    theirs = theirs.reshape(ours.shape)
    different = (ours != theirs).any(axis=1)
    # None differs where the library multiplies and adds in two steps, as for x86. Where a compiler joins both, the sums
    # are rounded otherwise, and two scales whose errors are nearly the same may change places.
    assert different.mean() <= 0.01, f"{different.sum()} of {len(different)} blocks differ"
    assert errors(kind, ours, numbers).sum() <= errors(kind, theirs, numbers).sum() * (1 + 1e-4)


# The mean squared error of normal numbers, as a share of their variance: 6 dB a bit.
BOUNDS = {"Q2_K": 0.1, "Q3_K": 0.03, "Q4_K": 0.008, "Q5_K": 0.002, "Q6_K": 0.0006, "IQ4_NL": 0.008, "IQ4_XS": 0.008}


@pytest.mark.parametrize("kind", K_TYPES)
def test_numbers_are_near_their_codes(kind):
    numbers = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    assert BOUNDS[kind] / 2 < errors(kind, blocks(kind, numbers), numbers).sum() / numbers.size < BOUNDS[kind]
    zeros = np.zeros((1, 1024), np.float32)
    assert errors(kind, blocks(kind, zeros), zeros).sum() == 0
