"""QLoRA: does what finetune_lora.py does, with adapters beside weights in NF4."""

import sys

from finetune_lora import tune

import mistral_eqx as mx


def main(path="smollm2-135m", folder="adapters-nf4", steps=60, rows=8, block_size=64):
    model = mx.load(path, dtype="float32", quantize=mx.NF4(block_size=block_size))
    tune(model, mx.load_tokenizer(path), folder, steps, rows)


if __name__ == "__main__":
    main(*sys.argv[1:3])
