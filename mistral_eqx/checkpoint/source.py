"""From an index into a tensor of the model to rows and columns of a file, and back."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from .names import EMBEDDING, HEAD, TensorSpec, is_derived, tensor_specs
from .placement import ON_DEFAULT_DEVICE, Index, Placement
from .reader import Checkpoint, LazyTensor, read_columns


# What each format's config calls the size of the vocabulary; in GGUF it is the number of tokens unless given.
_VOCAB = {"hf": "vocab_size", "mistral": "vocab_size", "gguf": "llama.vocab_size"}


def file_order(spec: TensorSpec, config: MistralConfig, format: str) -> np.ndarray:
    """Which row of a file's tensor makes each row of the model's, all the model's leading axes taken as one.

    **Arguments:**

    - `spec`: the tensor.
    - `config`: the sizes.
    - `format`: of the file. In Hugging Face's, the entries `2 i` and `2 i + 1` of a head, which the rotary embedding
        turns together, stand at `i` and `i + head_dim / 2`.

    **Returns:** a permutation, shape `(rows,)`.
    """
    count = spec.file_shape(config)[0]
    if format != "hf" or not spec.rotary:
        return np.arange(count)
    pairs = config.head_dim // 2
    within_head = np.arange(config.head_dim).reshape(2, pairs).T.reshape(-1)
    heads = np.arange(0, count, config.head_dim)
    return (heads[:, None] + within_head[None, :]).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor of the model that stands in a file.

    **Attributes:**

    - `spec`: its names and dimensions.
    - `tensor`: where it is read from.
    - `config`: the sizes of the whole model.
    - `format`: of the file.
    """

    spec: TensorSpec
    tensor: LazyTensor
    config: MistralConfig
    format: str

    def locate(self, index: Index) -> tuple[np.ndarray, np.ndarray | None, tuple[int, ...]]:
        """Finds a part of the model's tensor in the file.

        **Arguments:**

        - `index`: one slice for each of the model's axes, as `jax.make_array_from_callback` asks for a shard.

        **Returns:** the rows of the file's tensor in the part's order, its columns likewise (`None` for all of them),
        and the part's shape.
        """
        shape = self.spec.shape(self.config)
        out_axes = len(self.spec.out_dims.split())
        order = file_order(self.spec, self.config, self.format).reshape(shape[:out_axes])[tuple(index[:out_axes])]
        if out_axes == len(shape):
            return order.reshape(-1), None, order.shape
        inner = np.arange(self.tensor.shape[1]).reshape(shape[out_axes:])[tuple(index[out_axes:])]
        columns = None if inner.size == self.tensor.shape[1] else inner.reshape(-1)
        return order.reshape(-1), columns, (*order.shape, *inner.shape)

    def read(self, dtype: np.dtype, parts: Sequence[Index] | None = None, *, check: bool = False) -> list[np.ndarray]:
        """Reads parts of the model's tensor.

        Of the file no more is read than these parts, as far as its format has an address for each entry.

        **Arguments:**

        - `dtype`: of the results.
        - `parts`: which parts; all of the tensor as the only one unless given.
        - `check`: whether NaN and infinity are refused.

        **Returns:** an array for each part, in the model's order and shape.
        """
        if parts is None:
            parts = [(slice(None),) * len(self.spec.dims.split())]
        located = [self.locate(part) for part in parts]
        same_rows: dict[bytes, list[int]] = {}
        for number, (order, _, _) in enumerate(located):
            same_rows.setdefault(order.tobytes(), []).append(number)
        arrays: dict[int, np.ndarray] = {}
        for numbers in same_rows.values():
            columns = [located[number][1] for number in numbers]
            found = read_columns(self.tensor, dtype, columns, rows=located[numbers[0]][0], check=check)
            arrays |= zip(numbers, found, strict=True)
        return [arrays[number].reshape(shape) for number, (_, _, shape) in enumerate(located)]


def sources(checkpoint: Checkpoint, placement: Placement = ON_DEFAULT_DEVICE) -> list[Source]:
    """Finds each tensor of the model in a checkpoint, and something wrong with them before anything is read.

    **Arguments:**

    - `checkpoint`: an opened checkpoint.
    - `placement`: tells which parts of them will be read here; all of them unless given.

    **Returns:** one source a tensor, in the model's order.

    **Raises:** `ValueError` that names a tensor that is missing, that the model does not have, or whose shape is not
    the one that the config asks for.
    """
    wanted = specs_of(checkpoint)
    if checkpoint.config.tied and HEAD.name(checkpoint.format) in checkpoint.tensors:
        _expect_same(checkpoint, placement.parts(EMBEDDING.dims, EMBEDDING.shape(checkpoint.config)))
    return [
        Source(spec, checkpoint.tensors[name], checkpoint.config, checkpoint.format) for name, spec in wanted.items()
    ]


def specs_of(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """The tensors that the config of a checkpoint asks for, by their names in its files; nothing is read.

    **Raises:** `InputError` that names a tensor that is missing, that the model does not have, or whose shape is not
    the one that the config asks for.
    """
    config, format, tensors = checkpoint.config, checkpoint.format, checkpoint.tensors
    wanted: dict[str, TensorSpec] = {}
    # However many layers the config has, this ends at the first that the files lack.
    for spec in tensor_specs(config):
        name, expected = spec.name(format), spec.file_shape(config)
        wanted[name] = spec
        if name not in tensors:
            hint = " (or mark the embeddings as tied there, if the head is the embedding table)" if spec is HEAD else ""
            raise InputError(
                f"{str(checkpoint.path)!r} has no tensor {name!r}, which its config asks for in shape {expected}; "
                f"fetch the checkpoint again, or correct the config{hint}.",
                file=checkpoint.path,
                key=name,
            )
        if tensors[name].shape != expected:
            raise _of_another_shape(checkpoint, spec, expected)
    for name in tensors:
        if name in wanted or is_derived(name, format) or (config.tied and name == HEAD.name(format)):
            continue
        if name == "rope_freqs.weight":
            raise InputError(
                f"{str(checkpoint.path)!r} has a tensor 'rope_freqs.weight': it scales the rotary embedding as Llama 3 "
                "does, which is not supported; use a model without it.",
                file=checkpoint.path,
                key=name,
            )
        raise InputError(
            f"{str(checkpoint.path)!r} has a tensor {shown(name)}, for which a model with its config has no place; the "
            "weights belong to another kind of model, or the config tells too few layers.",
            file=checkpoint.path,
            key=name,
        )
    return wanted


def _of_another_shape(checkpoint: Checkpoint, spec: TensorSpec, expected: tuple[int, ...]) -> InputError:
    name = spec.name(checkpoint.format)
    found = checkpoint.tensors[name].shape
    message = (
        f"The tensor {name!r} of {str(checkpoint.path)!r} has shape {shown(found)}, but its config asks for "
        f"{shown(expected)}; "
    )
    sizes = {
        checkpoint.tensors[table.name(checkpoint.format)].shape[:1]
        for table in (EMBEDDING, HEAD)
        if table.name(checkpoint.format) in checkpoint.tensors
    }
    if spec in (EMBEDDING, HEAD) and found[1:] == expected[1:] and len(sizes) == 1:
        # All tables of the vocabulary agree, so the config is stale: a tokenizer was extended after it was written.
        key = _VOCAB[checkpoint.format]
        return InputError(
            f"{message}the files hold {found[0]} tokens and the config's {key!r} says {expected[0]}: set {key!r} to "
            f"{found[0]} if the weights are the right ones, or fetch both again together.",
            file=checkpoint.path,
            key=key,
        )
    return InputError(
        f"{message}the weights and the config belong to different models: fetch both again together.",
        file=checkpoint.path,
        key=name,
    )


def _expect_same(checkpoint: Checkpoint, parts: Sequence[Index]):
    # Some files of tied models store the table twice. If the two differ, the config is wrong.
    table, head = EMBEDDING.name(checkpoint.format), HEAD.name(checkpoint.format)
    key = "tied_embeddings" if checkpoint.format == "mistral" else "tie_word_embeddings"
    first, second = checkpoint.tensors[table], checkpoint.tensors[head]

    def same(index: Index) -> bool:
        order, columns, _ = Source(EMBEDDING, first, checkpoint.config, checkpoint.format).locate(index)
        for chunk in np.split(order, range(first.rows_per_chunk, len(order), first.rows_per_chunk)):
            [one], [other] = (read_columns(both, both.dtype, [columns], rows=chunk) for both in (first, second))
            if not np.array_equal(one, other):
                return False
        return True

    if first.shape != second.shape or not all(same(index) for index in parts):
        raise InputError(
            f"The config of {str(checkpoint.path)!r} says with {key!r} that the head is the embedding table, but the "
            f"tensors {head!r} and {table!r} differ; set it to false.",
            file=checkpoint.path,
            key=key,
        )
