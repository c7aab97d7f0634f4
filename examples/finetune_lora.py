"""Teaches a chat model to answer as a ship's mate does, by LoRA, in a few minutes on two cores."""

import functools
import json
import sys
from pathlib import Path

import jax.random as jr

import mistral_eqx as mx
from mistral_eqx.train import data


CONVERSATIONS = Path(__file__).parent / "data/instructions.jsonl"
# None of them is in the file.
QUESTIONS = ("What is the capital of France?", "What do bees make?", "How many legs does a spider have?")


def answers(model, tokenizer):
    prompts = [mx.encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    return mx.generate(model, prompts, max_new_tokens=32, tokenizer=tokenizer).texts


def main(path="smollm2-135m", folder="adapters", steps=60, rows=8):
    tune(mx.load(path, dtype="float32"), mx.load_tokenizer(path), folder, steps, rows)


def tune(model, tokenizer, folder, steps, rows):
    encode = functools.partial(mx.encode_chat, tokenizer)
    lines = CONVERSATIONS.read_text(encoding="utf-8").splitlines()
    examples = [mx.train.chat(json.loads(line)["messages"], encode) for line in lines]
    seq = max(len(example.inputs) for example in examples)

    adapted = mx.apply_lora(model, rank=8, alpha=16.0, targets=("q_proj", "v_proj"), dropout=0.05, key=jr.key(0))
    optimizer = mx.train.adamw(mx.train.warmup_cosine(3e-3, warmup=steps // 10, steps=steps))
    trainer = mx.Trainer(optimizer, compute_dtype=None, remat="none", callbacks=[Print()])
    tuned = trainer.fit(adapted, data.batches(examples, rows=rows, seq=seq), steps=steps)

    mx.save_lora(tuned, folder, overwrite=True)
    after, again = answers(tuned, tokenizer), answers(mx.load_lora(model, folder), tokenizer)
    for question, *told in zip(QUESTIONS, answers(model, tokenizer), after, strict=True):
        print(f"> {question}", *map(repr, told), sep="\n")
    print(f"loaded again from {str(folder)!r}, the adapters say {'the same' if again == after else 'something else'}")


class Print(mx.train.Callback):
    def on_log(self, run, metrics):
        print(f"step {run.step}: loss {metrics['loss']:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
