"""Gradients and steps of torch, through the models of transformers."""

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from fixtures.model import relative_error

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.nn import stack


pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def make_models():
    torch = pytest.importorskip("torch")
    # Torch's threads wait for each other without rest: where other programs run too, two are ten times as slow as one.
    torch.set_num_threads(1)
    pytest.importorskip("transformers")
    from fixtures import make_models

    return make_models


def _texts(seed, vocab):
    """Texts of several lengths, longer than any window, and whether each token is to be told.

    They differ by less than a window: transformers has no number for padding that sees nothing but padding.
    """
    draw = np.random.default_rng(seed)
    texts = [draw.integers(0, vocab, length) for length in (24, 19, 18, 22)]
    return texts, [draw.random(len(text)) < 0.7 for text in texts]


def _batch(texts, learned):
    examples = [train.causal(text, told.astype(np.float32)) for text, told in zip(texts, learned, strict=True)]
    return train.one_a_row(examples, 24)


def _their_loss(model, texts, learned):
    """As transformers takes it: the shift is its own, labels of -100 are ignored, and so is padding."""
    import torch

    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (text, told) in enumerate(zip(texts, learned, strict=True)):
        ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text), 1
        labels[row, : len(text)] = torch.from_numpy(np.where(told, text, -100))
    return model(ids, attention_mask=mask, labels=labels).loss


def _ours(model, folder):
    """Their model as ours: also one whose weights are gradients, for these are permuted as the weights are."""
    model.save_pretrained(folder)
    return mx.load(folder)


def _gradients(model, folder):
    """The gradients of all of a model's weights, as one of our models."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return _ours(model.float(), folder)


def _named(model):
    weights = eqx.filter(stack(model), train.trained(stack(model)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(weights)}


@pytest.mark.parametrize("variant", ["gqa_3", "window", "alternating", "tied", "llama"])
def test_gradient_of_every_tensor(make_models, variant, tmp_path):
    theirs = make_models.random_model(variant)
    ours = _ours(theirs, tmp_path / "model")
    texts, learned = _texts(0, ours.config.vocab)
    loss = _their_loss(theirs.double(), texts, learned)
    loss.backward()
    expected = _named(_gradients(theirs, tmp_path / "gradients"))
    # The optimizer's state is the gradient itself.
    optimizer = optax.trace(0.0)
    state = train.TrainState.init(ours, optimizer)
    step = train.make_step(optimizer, compute_dtype=None, clip=None, accumulate=2)
    state, metrics = step(state, _batch(texts, learned))
    np.testing.assert_allclose(metrics.loss, loss.item(), rtol=1e-6)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state.optimizer_state.trace)}
    assert found.keys() == expected.keys()
    assert len(found) >= 11
    for name in found:
        # Float32 against float64.
        assert relative_error(found[name], expected[name]) < 1e-5, name


def test_steps_of_adamw(make_models, tmp_path):
    """Clipping, decay of the matrices alone, and moments, over some steps."""
    import torch

    theirs = make_models.random_model("llama")
    ours = _ours(theirs, tmp_path / "model")
    matrices = [parameter for name, parameter in theirs.named_parameters() if "proj" in name or "lm_head" in name]
    others = [parameter for name, parameter in theirs.named_parameters() if "norm" in name or "embed_tokens" in name]
    assert len(matrices) + len(others) == len(list(theirs.parameters()))
    # A larger epsilon: else an entry whose gradient is nothing but rounding moves as far as any other.
    rate, settings = 1e-2, {"eps": 1e-4}
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    their_optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), **settings)
    optimizer = train.adamw(rate, weight_decay=0.1, b1=0.9, b2=0.95, **settings)
    before = _named(ours)
    state = train.TrainState.init(ours, optimizer)
    step = train.make_step(optimizer, compute_dtype=None, clip=1.0)
    for seed in range(4):
        texts, learned = _texts(seed, ours.config.vocab)
        their_optimizer.zero_grad()
        _their_loss(theirs, texts, learned).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()
        state, metrics = step(state, _batch(texts, learned))
        np.testing.assert_allclose(metrics.gradient_norm, norm.item(), rtol=1e-5)
        assert norm > 1
    expected, found = _named(_ours(theirs, tmp_path / "after")), _named(state.unstacked())
    for name, weight in expected.items():
        moved = np.abs(weight - before[name]).max()
        assert moved > rate
        assert np.abs(found[name] - weight).max() < 1e-3 * moved, name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_with_label_smoothing_is_torch_s(make_models, smoothing):
    import torch

    draw = np.random.default_rng(0)
    head = mx.nn.Unembedding(mx.nn.DenseWeight(jax.numpy.asarray(draw.standard_normal((50, 8)), "float32")))
    hidden = draw.standard_normal((3, 7, 8)).astype(np.float32)
    texts = [draw.integers(0, 50, 8) for _ in range(3)]
    batch = train.one_a_row([train.causal(text, (draw.random(8) < 0.6).astype(np.float32)) for text in texts], 7)
    sums = train.loss_sums(head, jax.numpy.asarray(hidden), batch, label_smoothing=smoothing)
    logits = torch.from_numpy(hidden @ np.asarray(head.weight.value).T).reshape(-1, 50)
    labels = torch.from_numpy(np.where(batch.weights > 0, batch.targets, -100).astype(np.int64)).reshape(-1)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=-100)
    np.testing.assert_allclose(sums.loss / sums.weight, expected.item(), rtol=1e-5)
