"""What is damaged, what reads it, and what a result that is accepted is held to."""

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from damage import TEXTS, damaged_bytes, damaged_json, damaged_json_lines, damaged_toml
from outcome import command


@dataclasses.dataclass(frozen=True)
class Target:
    """**Attributes:**

    - `base`: a file below the folder of bases; its folder is copied too, unless it is the folder of bases itself.
    - `damage`: from the file's content and a random number generator to the damaged content.
    - `read`: from the path of the damaged file to what is wrong with the result, or `""`.
    - `names`: one of them stands in a refusal; the file's own name and folder count too.
    """

    base: str
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], str]
    names: tuple[str, ...] = ()

    def place(self, bases: Path, folder: Path, numbers: random.Random) -> Path:
        """Puts the damaged file into an empty folder, and returns its path."""
        path = folder / self.base
        if "/" in self.base:
            shutil.copytree((bases / self.base).parent, path.parent)
        path.write_bytes(self.damage((bases / self.base).read_bytes(), numbers))
        return path


def _head(size: int) -> Callable[[bytes, random.Random], bytes]:
    return lambda content, numbers: damaged_bytes(content, numbers, size)


def _safetensors(path: Path) -> str:
    import safetensors

    from mistral_eqx.checkpoint.safetensors import read_header

    ours = {name: np.asarray(tensor[:]) for name, tensor in read_header(path).items()}
    try:
        theirs = dict(safetensors.deserialize(path.read_bytes()))
    except Exception as error:
        return f"the reference refuses it: {error}"
    if ours.keys() != theirs.keys():
        return "other tensors than the reference reads"
    same = (
        tuple(theirs[name]["shape"]) == x.shape and bytes(theirs[name]["data"]) == x.tobytes()
        for name, x in ours.items()
    )
    return "" if all(same) else "other values than the reference reads"


def _gguf(path: Path) -> str:
    import gguf

    from mistral_eqx.checkpoint.gguf import read_gguf

    metadata, tensors = read_gguf(path)
    ours = {name: np.asarray(tensor[:]) for name, tensor in tensors.items()}
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:
        return f"the reference refuses it: {error}"
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    if ours.keys() != theirs.keys():
        return "other tensors than the reference reads"
    for name, tensor in theirs.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.tobytes() != ours[name].astype(np.float32).tobytes():
            return f"other values of {name} than the reference reads"
    for key, field in reader.fields.items():
        value = None if key.startswith("GGUF.") else field.contents()
        if isinstance(value, str | bool | int) and metadata.get(key) != value:
            return f"another value of {key} than the reference reads"
    return ""


def _opened(path: Path) -> str:
    from mistral_eqx.checkpoint import open_checkpoint

    config = open_checkpoint(path if path.suffix == ".gguf" else path.parent).config
    numbers = [value for value in dataclasses.astuple(config) if isinstance(value, float)]
    ids = [config.bos_id, *config.eos_ids]
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        return f"a config with the numbers {numbers}"
    return "" if all(id is None or id >= 0 for id in ids) else f"a config with the ids {ids}"


def _loaded(path: Path) -> str:
    import mistral_eqx as mx

    mx.load(path if path.suffix == ".gguf" else path.parent)
    return ""


_SAMPLES = ("hello the 123", " ", "h\u00e9llo \u5929", "<|im_end|>a", "aaaa\n\n  b", "<s>[INST]")


def _tokenizer(path: Path) -> str:
    import mistral_eqx as mx

    tokenizer = mx.load_tokenizer(path if path.suffix == ".gguf" else path.parent)
    for text in _SAMPLES:
        ids = tokenizer.encode(text)
        if not all(0 <= id < tokenizer.vocab for id in ids):
            return f"ids outside the vocabulary of {tokenizer.vocab}: {ids}"
        tokenizer.decode(ids)
    for id in range(min(tokenizer.vocab, 400)):
        tokenizer.token_bytes(id, first=False)
    if tokenizer.chat_template is not None:
        mx.encode_chat(tokenizer, [{"role": "user", "content": "hi <|im_end|> there"}])
    return ""


def _adapter(path: Path) -> str:
    import jax

    import mistral_eqx as mx

    adapted = mx.load_lora(mx.load(path.parents[1] / "hf"), path.parent)
    scales = [x for x in jax.tree.leaves(adapted) if isinstance(x, float)]
    return "" if all(map(math.isfinite, scales)) else "a scale that is not finite"


def _messages(path: Path) -> str:
    import mistral_eqx as mx

    tokenizer = mx.load_tokenizer(path.parent / "hf")
    try:
        messages = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return ""
    mx.encode_chat(tokenizer, messages)
    return ""


def _template(path: Path) -> str:
    import mistral_eqx as mx

    mx.render_chat(mx.load_tokenizer(path.parent), [{"role": "user", "content": "hi"}])
    return ""


_OPTIONS = (
    *("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--typical-p", "--repetition-penalty"),
    *("--presence-penalty", "--frequency-penalty", "--min-new-tokens", "--num-samples", "--num-beams", "--stop"),
    *("--length-penalty", "--logprobs", "--seed", "--prefill-chunk", "--cache-dtype", "--dtype", "--mesh"),
    *("--strategy", "--model"),
)


def _options(content: bytes, numbers: random.Random) -> bytes:
    """Two options with values that may be anything, as JSON."""
    chosen = numbers.sample(_OPTIONS, 2)
    return json.dumps([f"{option}={numbers.choice(TEXTS)}" for option in chosen]).encode()


def _generate(path: Path) -> str:
    options = json.loads(path.read_bytes())
    return command("generate", "hello", "--model", str(path.parent), "--max-new-tokens=2", *options)


TARGETS = {
    "safetensors": Target("hf/model.safetensors", _head(2200), _safetensors),
    "gguf": Target("bytes.gguf", _head(9000), _gguf),
    "gguf-model": Target("bytes.gguf", _head(9000), _loaded),
    "gguf-bytes": Target("bytes.gguf", _head(9000), _tokenizer),
    "gguf-pieces": Target("pieces.gguf", _head(9000), _tokenizer),
    "config": Target("hf/config.json", damaged_json, _opened),
    "params": Target("mistral/params.json", damaged_json, _opened),
    "index": Target("shards/model.safetensors.index.json", damaged_json, _loaded, ("/shards",)),
    "tokenizer": Target("hf/tokenizer.json", damaged_json, _tokenizer),
    "tokenizer-config": Target("hf/tokenizer_config.json", damaged_json, _tokenizer, ("/hf",)),
    "generation-config": Target("hf/generation_config.json", damaged_json, _tokenizer),
    "sentencepiece": Target("mistral/tokenizer.model.v3", _head(5000), _tokenizer),
    "tekken": Target("tekken/tekken.json", damaged_json, _tokenizer),
    "adapter-config": Target("adapter/adapter_config.json", damaged_json, _adapter, ("/adapter",)),
    "adapter": Target("adapter/adapter_model.safetensors", _head(1500), _adapter, ("/adapter",)),
    "messages": Target("messages.json", damaged_json, _messages, ("message", "template", "conversation", "text")),
    "template": Target("hf/chat_template.jinja", damaged_bytes, _template, ("template",)),
    "prompts": Target(
        "prompts.jsonl",
        damaged_json_lines,
        lambda path: command("generate", "--model", str(path.parent / "hf"), "--prompts", str(path), "-n", "1"),
    ),
    "options": Target("hf/options.json", _options, _generate, _OPTIONS),
    "recipe": Target("recipe.toml", damaged_toml, lambda path: command("train", str(path)), ("recipe", "--set")),
}
