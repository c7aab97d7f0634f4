"""Arguments of training that are out of their range are refused where they are given, in one sentence."""

import functools

import numpy as np
import optax
import pytest
from fixtures.generation import refused

import mistral_eqx as mx
from mistral_eqx.train import data


IDS = list(range(3, 20))
RANDOM = np.random.default_rng(0)
MASK = functools.partial(mx.train.bert_mask, IDS, RANDOM)
STEP = functools.partial(mx.train.make_step, optax.sgd(0.1))
BATCHES = functools.partial(data.batches, [[1, 2, 3]] * 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MASK(mask_id=1, vocab=20, probability=1.5), ["probability is 1.5", "at most 1"]),
        (lambda: MASK(mask_id=1, vocab=20, probability=float("nan")), ["probability is nan", "finite"]),
        (lambda: MASK(mask_id=-1, vocab=20), ["mask_id is -1"]),
        (lambda: MASK(mask_id=1, vocab=0), ["vocab is 0"]),
        (lambda: mx.train.mass(IDS, RANDOM, mask_id=1, vocab=20, part=-0.1), ["part is -0.1"]),
        (lambda: mx.train.drop_spans(IDS, RANDOM, density=2), ["density is 2"]),
        (lambda: mx.train.drop_spans(IDS, RANDOM, mean_span=0), ["mean_span is 0", "at least 1"]),
        (lambda: mx.train.replace_spans(IDS, RANDOM, sentinels=[1, 2], mean_span=float("inf")), ["mean_span is inf"]),
        (lambda: STEP(accumulate=0), ["accumulate is 0"]),
        (lambda: STEP(accumulate=1.5), ["accumulate is 1.5", "whole number"]),
        (lambda: STEP(clip=0.0), ["clip is 0.0", "greater than 0"]),
        (lambda: STEP(clip=float("nan")), ["clip is nan"]),
        (lambda: STEP(label_smoothing=1.0), ["label_smoothing is 1.0", "less than 1"]),
        (lambda: STEP(z_loss=-1e-4), ["z_loss is -0.0001"]),
        (lambda: STEP(capacity=0.0), ["capacity is 0.0", "greater than 0"]),
        (lambda: STEP(seed=-1), ["seed is -1"]),
        (lambda: mx.train.warmup_cosine(0.1, warmup=1, steps=4, end=2.0**63), ["above the peak 0.1"]),
        (lambda: mx.train.wsd(0.1, warmup=1, steps=4, decay=2, end=0.2), ["end 0.2", "above the peak 0.1"]),
        (lambda: BATCHES(rows=0, seq=8), ["rows is 0"]),
        (lambda: BATCHES(rows=2, seq=2.5), ["seq is 2.5"]),
        (lambda: BATCHES(rows=2, seq=8, seed=2**32), ["seed is 4294967296"]),
        (lambda: BATCHES(rows=2, seq=8, epochs=0), ["epochs is 0"]),
        (lambda: BATCHES(rows=2, seq=8, shuffle="no"), ["shuffle is 'no'", "true or false"]),
        (lambda: BATCHES(rows=2, seq=8, remainder="keep"), ["remainder is 'keep'", "'drop', 'pad'"]),
        (lambda: mx.train.EarlyStop(0), ["patience is 0"]),
        (lambda: mx.train.EarlyStop(2, by=float("nan")), ["by is nan"]),
        (lambda: mx.train.Samples(print, every=0), ["every is 0"]),
        (lambda: data.Characters("abc" * 40, seq=0), ["seq is 0"]),
    ],
)
def test_what_is_out_of_its_range(call, words):
    with refused(*words):
        call()
