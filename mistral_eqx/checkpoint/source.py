"""Maps an index into a tensor of the model to rows and columns of a tensor in a file."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from .names import EMBEDDING, HEAD, LayerSpec, is_derived, layer_specs
from .placement import ON_DEFAULT_DEVICE, Index, Placement
from .ranges import runs
from .reader import READS_WITH_COPY, Checkpoint, LazyTensor, aligned, read_columns


def file_order(spec: LayerSpec, config: MistralConfig, format: str) -> np.ndarray:
    """For each row of the model's tensor, its row in the file. `out_dims` of the model are flattened to one axis.

    **Arguments:**

    - `spec`: the spec of the tensor.
    - `config`: the sizes of the model.
    - `format`: the format of the file. In the Hugging Face format, the entries `2 i` and `2 i + 1` of a head, a pair
        of the rotary embedding, have the positions `i` and `i + head_dim / 2`.

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
    """A tensor of the model and the tensor of a file that it is read from or written to.

    **Attributes:**

    - `spec`: the names and dimensions of the tensor.
    - `tensor`: the tensor in the file.
    - `config`: the sizes of the whole model.
    - `format`: the format of the file.
    - `stored_shape`: the shape of the array in the model if it is not that of the weight, because it holds the bytes of
        blocks.
    """

    spec: LayerSpec
    tensor: LazyTensor
    config: MistralConfig
    format: str
    stored_shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array in the model."""
        return self.spec.shape(self.config) if self.stored_shape is None else self.stored_shape

    @property
    def nbytes(self) -> int:
        """The size in the file."""
        return self.tensor.nbytes

    def locate(self, index: Index) -> tuple[np.ndarray, np.ndarray | None, tuple[int, ...]]:
        """Finds the rows and columns of a shard in the file.

        **Arguments:**

        - `index`: one slice for each of the model's axes, as in `jax.make_array_from_callback`.

        **Returns:** the file's rows in the order of the shard, its columns in the order of the shard (`None` for all
        columns), and the shape of the shard.
        """
        shape = self.shape
        out_axes = len(self.spec.out_dims.split())
        order = file_order(self.spec, self.config, self.format).reshape(shape[:out_axes])[tuple(index[:out_axes])]
        if out_axes == len(shape):
            return order.reshape(-1), None, order.shape
        inner = np.arange(self.tensor.shape[1]).reshape(shape[out_axes:])[tuple(index[out_axes:])]
        columns = None if inner.size == self.tensor.shape[1] else inner.reshape(-1)
        return order.reshape(-1), columns, (*order.shape, *inner.shape)

    def read(self, dtype: np.dtype, shards: Sequence[Index] | None = None, *, check: bool = False) -> list[np.ndarray]:
        """Reads shards of the model's tensor.

        Only the bytes of these shards are read, or whole blocks if the format is quantised.

        **Arguments:**

        - `dtype`: the dtype of the results.
        - `shards`: the shards to read; by default one shard, the whole tensor.
        - `check`: whether to refuse NaN and infinity.

        **Returns:** an array for each shard, in the model's order and shape.
        """
        if shards is None:
            shards = [(slice(None),) * len(self.shape)]
        located = [self.locate(shard) for shard in shards]
        same_rows: dict[bytes, list[int]] = {}
        for number, (order, _, _) in enumerate(located):
            same_rows.setdefault(order.tobytes(), []).append(number)
        arrays: dict[int, np.ndarray] = {}
        for numbers in same_rows.values():
            columns = [located[number][1] for number in numbers]
            found = read_columns(self.tensor, dtype, columns, rows=located[numbers[0]][0], check=check)
            arrays |= zip(numbers, found, strict=True)
        return [arrays[number].reshape(shape) for number, (_, _, shape) in enumerate(located)]

    def pieces(self, shard: Index, array: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """Splits a shard into the arguments of `LazyTensor.write`, a chunk each: the inverse of `read`.

        **Arguments:**

        - `shard`: the position of the shard.
        - `array`: its numbers, in the model's order and shape.

        **Returns:** for each piece its first row in the file, its rows, and their columns in the file.
        """
        order, columns, _ = self.locate(shard)
        rows = array.reshape((len(order), -1)[: len(self.tensor.shape)])
        ascending = np.argsort(order)
        for start, stop in runs(order[ascending], self.tensor.rows_per_chunk):
            chosen = ascending[start:stop]
            # Rows that are side by side in the model too are not copied.
            side_by_side = len(list(runs(chosen))) == 1
            block = rows[chosen[0] : chosen[-1] + 1] if side_by_side else rows[chosen]
            yield int(order[chosen[0]]), block, columns


@dataclasses.dataclass(frozen=True)
class SourceOfLayers:
    """The tensors of several layers, of which a stacked model has one array with a first axis `layers`.

    **Attributes:**

    - `path`: the path of the weight in the blocks of the stacked model.
    - `layers`: the source of each layer, in order.
    """

    path: str
    layers: Sequence[Source]

    @property
    def spec(self) -> LayerSpec:
        """The path and the dimensions of the array."""
        spec = self.layers[0].spec
        return dataclasses.replace(spec, path=self.path, out_dims=f"layers {spec.out_dims}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return len(self.layers), *self.layers[0].shape

    @property
    def nbytes(self) -> int:
        """The size in the files."""
        return sum(source.nbytes for source in self.layers)

    def read(self, dtype: np.dtype, shards: Sequence[Index], *, check: bool = False) -> list[np.ndarray]:
        """Reads shards of the array, as `Source.read` does; of layers that are in none of them it reads nothing."""
        bounds = [[range(size)[axis] for axis, size in zip(shard, self.shape, strict=True)] for shard in shards]
        arrays = [aligned(tuple(map(len, each)), dtype) for each in bounds]

        def read(layer: int):
            held = [number for number, (layers, *_) in enumerate(bounds) if layer in layers]
            if held:
                found = self.layers[layer].read(dtype, [shards[number][1:] for number in held], check=check)
                for number, array in zip(held, found, strict=True):
                    arrays[number][bounds[number][0].index(layer)] = array

        with ThreadPoolExecutor(READS_WITH_COPY) as pool:
            for _ in pool.map(read, range(len(self.layers))):
                pass
        return arrays


def sources(checkpoint: Checkpoint, placement: Placement = ON_DEFAULT_DEVICE) -> list[Source]:
    """Finds the tensors of the model in a checkpoint, and checks their names and shapes before any weight is read.

    **Arguments:**

    - `checkpoint`: an opened checkpoint.
    - `placement`: gives the shards that this process will read; by default the whole tensors.

    **Returns:** one source for each tensor, in the model's order.

    **Raises:** `ValueError` that names a tensor that is missing, that the model does not have, or whose shape differs
    from the config's.
    """
    specs = specs_of(checkpoint)
    if checkpoint.config.tied and HEAD.name(checkpoint.format) in checkpoint.tensors:
        _check_tied(checkpoint, placement.shards(EMBEDDING.dims, EMBEDDING.shape(checkpoint.config)))
    return [
        Source(spec, checkpoint.tensors[name], checkpoint.config, checkpoint.format) for name, spec in specs.items()
    ]


def specs_of(checkpoint: Checkpoint) -> dict[str, LayerSpec]:
    """The specs of a checkpoint's tensors by their names in its files. Checks names and shapes, and reads no weights.

    **Raises:** `InputError` that names a tensor that is missing, that the model does not have, or whose shape differs
    from the config's.
    """
    config, format, tensors = checkpoint.config, checkpoint.format, checkpoint.tensors
    specs: dict[str, LayerSpec] = {}
    # If the config claims a huge number of layers, the loop ends at the first missing tensor.
    for spec in layer_specs(config):
        name, expected = spec.name(format), spec.file_shape(config)
        specs[name] = spec
        if name not in tensors:
            hint = " (or mark the embeddings as tied there, if the head is the embedding table)" if spec is HEAD else ""
            raise InputError(
                f"{str(checkpoint.path)!r} has no tensor {name!r}, which its config requires in shape {expected}; "
                f"fetch the checkpoint again, or correct the config{hint}.",
                file=checkpoint.path,
                key=name,
            )
        if tensors[name].shape != expected:
            raise _wrong_shape(checkpoint, spec, expected)
    for name in tensors:
        if name in specs or is_derived(name, format) or (config.tied and name == HEAD.name(format)):
            continue
        raise InputError(
            f"{str(checkpoint.path)!r} has a tensor {shown(name)}, which a model with its config does not have; the "
            "weights belong to another kind of model, or the config has too few layers.",
            file=checkpoint.path,
            key=name,
        )
    return specs


def _wrong_shape(checkpoint: Checkpoint, spec: LayerSpec, expected: tuple[int, ...]) -> InputError:
    name = spec.name(checkpoint.format)
    found = checkpoint.tensors[name].shape
    message = (
        f"The tensor {name!r} of {str(checkpoint.path)!r} has shape {shown(found)}, but its config requires "
        f"{shown(expected)}; "
    )
    sizes = {
        checkpoint.tensors[table.name(checkpoint.format)].shape[:1]
        for table in (EMBEDDING, HEAD)
        if table.name(checkpoint.format) in checkpoint.tensors
    }
    if spec in (EMBEDDING, HEAD) and found[1:] == expected[1:] and len(sizes) == 1:
        # Embedding and head have the same size, so the config is stale: the vocabulary was extended later.
        # In GGUF it is optional; the default is the number of tokens.
        of_gguf = checkpoint.format == "gguf"
        key = f"{checkpoint.metadata['general.architecture']}.vocab_size" if of_gguf else "vocab_size"
        return InputError(
            f"{message}the files hold {found[0]} tokens and the config's {key!r} is {expected[0]}: set {key!r} to "
            f"{found[0]} if the weights are the right ones, or fetch both again together.",
            file=checkpoint.path,
            key=key,
        )
    return InputError(
        f"{message}the weights and the config belong to different models: fetch both again together.",
        file=checkpoint.path,
        key=name,
    )


def _check_tied(checkpoint: Checkpoint, shards: Sequence[Index]):
    # Some files of tied models store the embedding table twice. If the copies differ, the config is wrong.
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

    if first.shape != second.shape or not all(same(index) for index in shards):
        raise InputError(
            f"The config of {str(checkpoint.path)!r} says with {key!r} that the head is the embedding table, but the "
            f"tensors {head!r} and {table!r} differ; set it to false.",
            file=checkpoint.path,
            key=key,
        )
