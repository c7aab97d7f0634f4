"""A model that fits in a test, on disk, and commands run on it."""

import json

import jax.random as jr
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

import mistral_eqx as mx
from mistral_eqx.cli import app
from mistral_eqx.config import MistralConfig


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_model(folder, *, max_positions=256):
    """Writes a random model whose tokens are bytes, with a tokenizer and a chat template."""
    controls = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate([*controls, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in controls])
    config = MistralConfig(
        vocab=len(vocabulary),
        embed=16,
        hidden=32,
        layers=2,
        kv_heads=2,
        q_per_kv=2,
        head_dim=4,
        rope_theta=1e4,
        norm_eps=1e-5,
        max_positions=max_positions,
        windows=(None, None),
        bos_id=0,
        eos_ids=(1,),
    )
    mx.save(mx.nn.Mistral.init(config, key=jr.key(0)), folder, format="hf")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def run(*arguments, input=None):
    """Runs a command of `mistral-eqx` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input, prog_name="mistral-eqx")


def assert_refused(result, *words):
    """Checks that a command ended with exit code 2 and one sentence on stderr that has these words."""
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line
