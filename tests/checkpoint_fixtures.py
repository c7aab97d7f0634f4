"""Small random models and checkpoints, and how a test changes their files."""

import contextlib
import dataclasses
import json
import math
import unittest.mock

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import numpy as np
from fixtures.text import tiny as vocabularies

from mistral_eqx.checkpoint import gguf as checkpoint_gguf, hf, safetensors
from mistral_eqx.checkpoint.loading import layer_path
from mistral_eqx.checkpoint.names import layer_specs
from mistral_eqx.checkpoint.ranges import read_ranges
from mistral_eqx.checkpoint.reader import DTYPES
from mistral_eqx.config import MistralConfig
from mistral_eqx.nn import Mistral


# Three query heads a key/value head, and heads that are together wider than the residual stream.
TINY = MistralConfig(
    vocab=80,
    embed=32,
    hidden=64,
    layers=2,
    kv_heads=2,
    q_per_kv=3,
    head_dim=16,
    rope_theta=1e4,
    norm_eps=1e-5,
    max_positions=64,
    windows=(None, None),
    bos_id=1,
    eos_ids=(2,),
)


def tiny(**changes):
    """The small config, with some of its fields changed."""
    return dataclasses.replace(TINY, **changes)


def random_model(config, key, dtype=jnp.float32):
    """A model in which no two weights are alike, the norms' included. Drawn by numpy: nothing is compiled for it."""
    numbers = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    skeleton = eqx.filter_eval_shape(Mistral.init, config, key=key, dtype=dtype)

    def draw(leaf):
        return jax.device_put(numbers.normal(size=leaf.shape).astype(leaf.dtype))

    return jax.tree.map(lambda leaf: draw(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, skeleton)


def weights(model):
    """The model's arrays by the paths of their layers, as numpy has them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {layer_path(path): np.asarray(leaf) for path, leaf in leaves if isinstance(leaf, jax.Array)}


def assert_same_weights(first, second):
    """Checks that two models are equal bit for bit, dtypes included."""
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for path, array in first.items():
        assert array.dtype == second[path].dtype, path
        assert array.tobytes() == second[path].tobytes(), path


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, *, metadata=(), tensors=(), vocabulary=None):
    """Writes a model as llama.cpp's converter does: matrices of one kind, vectors in float32.

    Unless a vocabulary is given, there are only names of tokens, from which no tokenizer can be made.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.q_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if vocabulary is None:
        writer.add_token_list([f"token {number}" for number in range(config.vocab)])
        writer.add_token_scores([0.5] * config.vocab)
        writer.add_bos_token_id(config.bos_id)
        writer.add_eos_token_id(config.eos_ids[0])
    else:
        vocabularies.add_vocabulary(writer, vocabulary)
    for key, value in metadata:
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    arrays = weights(model)
    for spec in layer_specs(config):
        array = arrays[spec.path].astype(np.float32).reshape(spec.file_shape(config))
        vector = array.ndim == 1
        raw = array if vector else gguf.quants.quantize(array, kind)
        writer.add_tensor(spec.name("gguf"), raw, raw_dtype=gguf.GGMLQuantizationType.F32 if vector else kind)
    for name, array in tensors:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_noise(folder, config, dtype="bfloat16"):
    """Writes a checkpoint of Hugging Face's format in a moment, a tensor at a time; small positive numbers."""
    folder.mkdir()
    dtype = DTYPES[dtype]
    noise = np.random.default_rng(0).integers(0x3C00, 0x3D00, size=2**20, dtype=np.uint16)

    def draw(seed, shape):
        for start in range(0, shape[0], 1024):
            part = (min(1024, shape[0] - start), *shape[1:])
            yield np.resize(np.roll(noise, seed + 7919 * start), math.prod(part) * dtype.itemsize // 2).view(dtype)

    described = [(spec.name("hf"), spec.file_shape(config)) for spec in layer_specs(config)]
    safetensors.write(
        folder / "model.safetensors",
        [(name, shape, dtype, draw(seed, shape)) for seed, (name, shape) in enumerate(described)],
    )
    (folder / "config.json").write_text(json.dumps(hf.write_config(config)))
    return folder


@contextlib.contextmanager
def counted_reads():
    """A list to which every range of bytes is added that is read from a file of weights, as its path and length."""
    seen = []

    def counting(path, ranges, into):
        ranges = list(ranges)
        seen.extend((path, nbytes) for _, nbytes in ranges)
        read_ranges(path, ranges, into)

    with contextlib.ExitStack() as patches:
        for module in (safetensors, checkpoint_gguf):
            patches.enter_context(unittest.mock.patch.object(module, "read_ranges", counting))
        yield seen


def edit_json(path, **changes):
    """Changes keys of a JSON file; `None` is written as null."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
