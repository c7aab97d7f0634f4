"""The loss by its formula, and sums that parts of a batch add up to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_eqx.nn import DenseWeight, Unembedding
from mistral_eqx.train import Batch, loss_sums


def _inputs():
    draw = np.random.default_rng(0)
    head = Unembedding(DenseWeight(jnp.asarray(draw.standard_normal((17, 6)))))
    hidden = jnp.asarray(draw.standard_normal((4, 5, 6)))
    targets = draw.integers(0, 17, (4, 5)).astype(np.int32)
    # Some targets are the likeliest token, and some count more than others or not at all.
    targets[:, :2] = np.asarray(head(hidden)).argmax(-1)[:, :2]
    weights = draw.choice([0, 0.5, 1, 2], (4, 5)).astype(np.float32)
    columns = np.broadcast_to(np.arange(5, dtype=np.int32), (4, 5))
    return head, hidden, Batch(targets, targets, weights, columns, np.zeros_like(columns), columns)


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
@pytest.mark.slow
def test_sums_are_those_of_the_formula(label_smoothing, z_loss):
    with jax.enable_x64(True):
        head, hidden, batch = _inputs()
        found = loss_sums(head, hidden, batch, label_smoothing=label_smoothing, z_loss=z_loss)
        logits = np.asarray(head(hidden))
        log_sums = np.log(np.exp(logits).sum(-1, keepdims=True))
        log_probs, smooth = logits - log_sums, np.full_like(logits, label_smoothing / 17)
        np.put_along_axis(smooth, batch.targets[..., None], 1 - label_smoothing + label_smoothing / 17, axis=-1)
        loss = -(smooth * log_probs).sum(-1) + z_loss * log_sums[..., 0] ** 2
        chosen = np.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
        correct = logits.argmax(-1) == batch.targets
        assert 0 < correct.mean() < 1
        expected = [(batch.weights * x).sum() for x in (loss, -chosen, correct, np.ones_like(loss))]
        # Sums of 20 terms in float64, in another order.
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        parts = [
            loss_sums(head, hidden[rows], jax.tree.map(lambda x, rows=rows: x[rows], batch), label_smoothing=0.1)
            for rows in (slice(0, 2), slice(2, 4))
        ]
        whole = loss_sums(head, hidden, batch, label_smoothing=0.1)
        np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-12)
