"""SmolLM2's perplexity on the beginning of Moby-Dick is that which transformers gives."""

import math
from pathlib import Path

import pytest

import mistral_eqx as mx


pytestmark = pytest.mark.parity

BOOK = Path(__file__).parents[1] / "examples/data/moby-dick.txt"
CONTEXT, STRIDE = 512, 256


def test_smollm2(smollm2_path, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # Torch's threads wait for each other without rest: where other programs run too, two are ten times as slow as one.
    torch.set_num_threads(1)
    ours, tokenizer = mx.load(smollm2_path, dtype="float32"), mx.load_tokenizer(smollm2_path)
    text = BOOK.read_text()[:9000]
    found = mx.perplexity(ours, tokenizer, text, context=CONTEXT, stride=STRIDE, batch=2)

    mx.save(ours, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    ids = torch.tensor([tokenizer.encode(text)])
    # The loop of transformers' page on perplexity, but for the sum of losses, of which the page takes a weighted mean.
    total, tokens, end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], STRIDE):
        before, end = end, min(begin + CONTEXT, ids.shape[1])
        targets = ids[:, begin:end].clone()
        targets[:, : before - begin] = -100
        with torch.no_grad():
            logits = theirs(ids[:, begin:end]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, targets[0, 1:], reduction="sum", ignore_index=-100)
        total += loss.item()
        tokens += int((targets[0, 1:] != -100).sum())
        if end == ids.shape[1]:
            break
    assert found.tokens == tokens == ids.shape[1] - 1 > 1500
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    # Sums of float32, whose last digits differ; far below what a wrong token or window would do.
    assert -found.log_prob == pytest.approx(total, rel=2e-5)
