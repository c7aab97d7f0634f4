"""Which dimensions are split over which axes of the mesh, as one line of text."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ..checks import checked
from ..config import MistralConfig
from ..errors import InputError


_ENTRY = re.compile(r"([a-z_]+)@([a-z_0-9]+(?:,[a-z_0-9]+)*)")
_WORDS = {"overlap": re.compile(r"overlap(?:=([12]))?"), "exchange": re.compile(r"exchange=(int8)")}

# The config has the sizes of the first; each call has the sizes of the second.
_OF_WEIGHTS = ("vocab", "embed", "hidden", "experts", "kv_heads", "q_per_kv", "head_dim")
_OF_CONFIG = (*_OF_WEIGHTS, "layers")
_OF_CALL = ("batch", "seq", "tokens", "kv_seq")

# Dimensions of the same array: one mesh axis cannot split two of them.
_ARRAYS = {
    "queries, keys and their scores": "batch kv_heads q_per_kv kv_seq head_dim",
    "q_proj": "kv_heads q_per_kv head_dim embed",
    "gate_proj": "experts hidden embed",
    "the hidden activations": "batch hidden",
    "the embedding": "vocab embed",
    "the logits": "batch vocab",
    "the residual stream": "batch tokens embed",
}


@runtime_checkable
class _HasConfig(Protocol):
    @property
    def config(self) -> MistralConfig: ...


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Maps names of dimensions to axes of the mesh, in the spirit of einsum.

    A strategy is not an array, so in a module it is a leaf that `equinox.filter_jit` treats as static, and one
    `jax.tree.map` replaces it in all layers. `strategy + "batch@dp"` is the strategy with that entry added.

    **Arguments:**

    - `layout`: entries `dim@axis` with spaces between, such as `"kv_heads@tp hidden@tp"`; a dimension may take
        several axes, the major one first: `"hidden@kv,rep"`. A dimension that is not named is not split. Where `tokens`
        is split, the word `overlap` runs products beside the exchange of their tokens, which travel along a ring in
        both directions; with `overlap=1` in one. With the word `exchange=int8`, the sums of the residual stream travel
        as int8 codes in passes of 32 tokens and more, for inference alone.

    **Raises:** `ValueError` if an entry has another form, or a dimension, one of its axes or a word comes twice.
    """

    layout: str = ""

    def __post_init__(self):
        checked(self.layout, str, "A strategy's layout", key="layout", remedy="for example 'kv_heads@tp hidden@tp'")
        # A wrong layout is refused here, not in the middle of a trace.
        self._axes  # noqa: B018
        self.overlap  # noqa: B018
        self.exchange  # noqa: B018

    @functools.cached_property
    def _axes(self) -> dict[str, tuple[str, ...]]:
        axes: dict[str, tuple[str, ...]] = {}
        for entry in self.layout.split():
            match = _ENTRY.fullmatch(entry)
            if any(word.fullmatch(entry) for word in _WORDS.values()):
                continue
            if match is None:
                raise InputError(
                    f"The entry {entry!r} of the strategy {self.layout!r} must be a dimension and its mesh axes, "
                    "such as 'kv_heads@tp' or 'hidden@kv,rep', or the word 'overlap', 'overlap=1' or 'exchange=int8'."
                )
            dim, names = match[1], tuple(match[2].split(","))
            if dim in axes:
                raise InputError(f"The strategy {self.layout!r} names the dimension {dim!r} twice; keep one entry.")
            if len(set(names)) < len(names):
                raise InputError(f"The entry {entry!r} of a strategy names one mesh axis twice; keep one.")
            axes[dim] = names
        return axes

    @functools.cached_property
    def _found(self) -> dict[str | None, tuple[str, ...]]:
        # What `axes` has returned: a planner asks for the same dimensions a million times.
        return {}

    @functools.cached_property
    def overlap(self) -> int:
        """In how many directions of a ring tokens travel beside products; 0 if products wait for exchanges."""
        word = self._word("overlap")
        return int(word[1] or 2) if word else 0

    @functools.cached_property
    def exchange(self) -> str | None:
        """The type of the codes in which the sums of the residual stream travel; `None` if they travel as they are."""
        word = self._word("exchange")
        return word[1] if word else None

    def _word(self, name: str) -> re.Match[str] | None:
        found = [match for match in map(_WORDS[name].fullmatch, self.layout.split()) if match is not None]
        if len(found) > 1:
            raise InputError(f"The strategy {self.layout!r} has the word {name!r} twice; keep one.")
        return found[0] if found else None

    def __add__(self, entries: str) -> "Strategy":
        checked(entries, str, "The entry added to a strategy", key="entries", remedy="for example 'batch@dp'")
        return Strategy(f"{self.layout} {entries}".strip())

    def without(self, dim: str) -> "Strategy":
        """The strategy without the entry of a dimension."""
        return Strategy(" ".join(entry for entry in self.layout.split() if not entry.startswith(f"{dim}@")))

    def spec(self, dims: str) -> PartitionSpec:
        """The `PartitionSpec` of an array.

        **Arguments:**

        - `dims`: the array's dimensions in order, such as `"kv_heads head_dim embed"`. `"layers+batch"` is one
            dimension, which has all rows of the first layer, then those of the second, and so on.

        **Returns:** one entry for each dimension, such as `PartitionSpec("tp", None, None)`.
        """
        entries = [self.axes(dim.replace("+", " ")) for dim in dims.split()]
        return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in entries))

    def axes(self, dims: str | None = None) -> tuple[str, ...]:
        """The mesh axes over which any of `dims` is split, by default of all dimensions; empty if none is split."""
        if dims not in self._found:
            split = self._axes.keys() if dims is None else dims.split()
            self._found[dims] = tuple(dict.fromkeys(axis for dim in split for axis in self._axes.get(dim, ())))
        return self._found[dims]

    def parts(self, dims: str, mesh: Mesh | AbstractMesh | Mapping[str, int] | None) -> int:
        """The number of shards into which `dims` together are split.

        **Arguments:**

        - `mesh`: a mesh, or the sizes of its axes; `None` for one device.
        """
        if mesh is None:
            return 1
        sizes = mesh if isinstance(mesh, Mapping) else mesh.shape
        return math.prod(sizes[axis] for axis in self.axes(dims))

    @property
    def name(self) -> str:
        """The text from which `read_strategy` reads this strategy: its name with further entries, or its layout."""
        if self == SINGLE:
            return "single"
        begin = [name for name, named in NAMED.items() if f"{self.layout} ".startswith(f"{named.layout} ")]
        if not begin:
            return self.layout
        name = max(begin, key=lambda name: len(NAMED[name].layout))
        return f"{name} {self.layout.removeprefix(NAMED[name].layout).strip()}".strip()

    def check_shape(self, name: str, dims: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh):
        """Checks that the devices divide each axis of an array that they split.

        A dimension that they divide may still be stored in units that they do not, such as blocks of quantized numbers.

        **Arguments:**

        - `name`: what the array is called in a message.
        - `dims`, `shape`: its dimensions and their sizes.
        - `mesh`: the mesh over which it is split.

        **Raises:** `ValueError`.
        """
        for dim, size in zip(dims.split(), shape, strict=True):
            names = dim.split("*")
            if len(names) > 1 and self.parts(" ".join(names), mesh) > 1:
                raise InputError(
                    f"{name} is stored in units across {' and '.join(filter(None, names))}, which the strategy "
                    f"{self.layout!r} would cut; split another dimension, or load the model with dtype='float32'."
                )
            devices = self.parts(dim, mesh)
            if size % devices and dim == "layers":
                raise InputError(
                    f"{name} is stacked over {size} layers or repeats of a pattern, which cannot be split over "
                    f"{devices} stages; stack the model with fewer chunks, or use fewer devices on that axis."
                )
            if size % devices:
                raise InputError(
                    f"{name} is stored in {size} {'unit' if size == 1 else 'units'} along {dim}, which cannot be split "
                    f"over {devices} devices; split another dimension, or load the model with dtype='float32'."
                )

    def check_length(self, seq: int, mesh: Mesh | AbstractMesh | Mapping[str, int] | None):
        """Checks that rows of `seq` tokens can be split where this strategy splits `seq`.

        **Raises:** `ValueError`.
        """
        devices = self.parts("seq", mesh)
        if devices > 1 and seq % (2 * devices):
            raise InputError(
                f"Rows of {seq} tokens cannot be split over {devices} devices, each of which takes two of "
                f"{2 * devices} equal slices; pad the rows to a multiple of {2 * devices}."
            )

    def check_micro_batches(self, rows: int, count: int, mesh: Mesh | AbstractMesh | Mapping[str, int] | None):
        """Checks that rows can be split into so many micro-batches on the devices that split `batch`.

        **Raises:** `ValueError`.
        """
        devices = self.parts("batch", mesh)
        if count < 1 or rows % (count * devices):
            raise InputError(
                f"{rows} rows cannot be split into {count} micro-batches on each of {devices} devices that split "
                f"'batch'; give a multiple of {max(count, 1) * devices} rows."
            )

    def check(self, model: MistralConfig | _HasConfig, mesh: Mesh | AbstractMesh):
        """Checks, before anything is traced, that this strategy can split a model over a mesh.

        **Arguments:**

        - `model`: a model or its config.
        - `mesh`: the mesh over which to split the model.

        **Raises:** `ValueError` if a dimension or an axis does not exist, if the devices do not divide a
        dimension that they split, or if one axis splits two dimensions of one array.
        """
        found = model if isinstance(model, MistralConfig) else getattr(model, "config", None)
        config: MistralConfig = checked(found, MistralConfig, "The model's config", key="model")
        checked(mesh, Mesh | AbstractMesh, "mesh", remedy="make one with mistral_eqx.make_mesh")
        sizes: Mapping[str, int] = mesh.shape
        for dim, axes in self._axes.items():
            if dim not in _OF_CONFIG + _OF_CALL:
                raise InputError(
                    f"The strategy {self.layout!r} splits {dim!r}, which is not a dimension that can be split; use one "
                    f"of {', '.join(_OF_CALL + _OF_CONFIG)}."
                )
            for axis in axes:
                if axis not in sizes:
                    raise InputError(
                        f"The strategy {self.layout!r} splits {dim!r} over the mesh axis {axis!r}, but the mesh has "
                        f"{_listed(sizes)}; make a mesh with that axis, or name an axis of the mesh."
                    )
            devices = self.parts(dim, mesh)
            if config.routing is None and dim == "experts":
                raise InputError(
                    f"The strategy {self.layout!r} splits 'experts', but the model has none; leave 'experts' out of it."
                )
            if config.routing is not None and dim == "embed" and devices > 1:
                raise InputError(
                    f"The strategy {self.layout!r} splits 'embed', which a model with experts cannot split; split "
                    "'experts' or 'hidden'."
                )
            if config.latent is not None and dim in ("embed", "q_per_kv", "head_dim") and devices > 1:
                raise InputError(
                    f"The strategy {self.layout!r} splits {dim!r}, which a model with latent attention cannot split, "
                    "because all heads share the latent; split 'kv_heads', 'kv_seq' or 'batch'."
                )
            for size in _sizes(config, dim):
                if size % devices:
                    raise InputError(f"{size} {dim} cannot be split over {devices} devices; {_remedy(dim, devices)}.")
            if dim == "head_dim" and config.head_dim // devices % 2:
                raise InputError(
                    f"{config.head_dim} head_dim over {devices} devices would split the pairs that the rotary "
                    "embedding rotates; use at most half as many devices."
                )
        for array, dims in _ARRAYS.items():
            taken: dict[str, str] = {}
            for dim in dims.split():
                for axis in self._axes.get(dim, ()):
                    if axis in taken:
                        raise InputError(
                            f"The strategy {self.layout!r} splits {taken[axis]!r} and {dim!r} over the same axis "
                            f"{axis!r}, and {array} {'have' if array.endswith('s') else 'has'} both; give one of them "
                            "another axis."
                        )
                    taken[axis] = dim
        routing = config.routing
        # A dense layer and shared experts sum over `hidden` alone.
        only = routing is None or routing.shared or config.dense_layers
        for dims in ("kv_heads q_per_kv head_dim", "hidden" if only else "experts hidden", "vocab"):
            missing = [axis for axis in self.axes("tokens") if axis not in self.axes(dims)]
            if missing:
                raise InputError(
                    f"The strategy {self.layout!r} splits 'tokens' over {missing[0]!r}, but none of {dims!r}, whose "
                    "sums are scattered over that axis; split one of them over it too."
                )
        if self.axes("layers"):
            self._check_stages(config, self.parts("layers", sizes))
        for dim, axes in self._axes.items():
            shared = [axis for axis in axes if axis in self.axes("seq")]
            if shared and dim not in ("seq", "kv_seq"):
                raise InputError(
                    f"The strategy {self.layout!r} splits 'seq' and {dim!r} over the same axis {shared[0]!r}, where a "
                    "sum would add up different tokens; give one of them another axis."
                )
        if self.axes("seq") and self.axes("kv_seq") not in ((), self.axes("seq")):
            raise InputError(
                f"The strategy {self.layout!r} splits 'seq' and 'kv_seq' over different axes; split both over the same "
                "axes, so that keys travel along a ring, or leave 'kv_seq' out, so that each device gathers them."
            )
        if self.overlap and not self.axes("tokens"):
            raise InputError(
                f"The strategy {self.layout!r} has the word 'overlap' but does not split 'tokens', whose exchanges it "
                "would overlap; add 'tokens@' with the axis that splits the heads, or leave the word out."
            )
        if self.exchange and self.overlap:
            raise InputError(
                f"The strategy {self.layout!r} has the words 'exchange=int8' and 'overlap', which cannot be combined; "
                "leave one of them out."
            )
        if self.exchange and not self.axes(" ".join(_OF_WEIGHTS)):
            raise InputError(
                f"The strategy {self.layout!r} has the word 'exchange=int8' but splits no weights, whose sums would be "
                "exchanged; leave the word out."
            )
        if self.axes("tokens") and self.axes("embed"):
            raise InputError(
                f"The strategy {self.layout!r} splits the residual stream by 'tokens' and by 'embed'; keep one of them."
            )

    def _check_stages(self, config: MistralConfig, stages: int):
        for dim in self._axes:
            shared = [axis for axis in self.axes("layers") if axis in self.axes(dim)]
            if dim != "layers" and shared:
                raise InputError(
                    f"The strategy {self.layout!r} splits 'layers' and {dim!r} over the same axis {shared[0]!r}, whose "
                    "devices have different layers; give one of them another axis."
                )
        if self.axes("seq"):
            raise InputError(
                f"The strategy {self.layout!r} splits 'layers' and 'seq', which cannot be combined; leave one of "
                "them out."
            )
        if stages > 1 and 0 < config.dense_layers < config.layers:
            raise InputError(
                f"The strategy {self.layout!r} splits the layers into {stages} stages, which must be equal, but only "
                f"the first {config.dense_layers} of {config.layers} layers are dense; leave 'layers' out of it."
            )
        if config.windows[: config.layers // stages] * stages != config.windows:
            raise InputError(
                f"The strategy {self.layout!r} splits the layers into {stages} stages whose windows differ; use fewer "
                "devices on that axis, so that the windows repeat from stage to stage."
            )


def _sizes(config: MistralConfig, dim: str) -> tuple[int, ...]:
    """The sizes that a dimension has in the weights of a model; none for a dimension of each call."""
    if dim == "hidden" and config.routing is not None:
        dense = (config.hidden,) if config.dense_layers else ()
        return (*dense, config.expert_hidden)
    return (getattr(config, dim),) if dim in _OF_CONFIG else ()


def whole(dims: str) -> str:
    """The name of one axis that has all of `dims`, which no strategy can split."""
    return "*".join(dims.split()) + "*"


def _remedy(dim: str, devices: int) -> str:
    match dim:
        case "kv_heads":
            return "use KV_REPLICATED or HEAD_DIM"
        case "q_per_kv":
            return "use HEADS_X_HEAD_DIM or HEADS_X_KV_SEQ, or fewer devices on that axis"
        case "head_dim":
            return "use fewer devices on that axis"
        case _:
            return f"leave {dim!r} out of the strategy, or use fewer devices on that axis"


def _listed(names: Mapping[str, int]) -> str:
    return ", ".join(f"{name!r} ({size})" for name, size in names.items()) or "no axes"


SINGLE = Strategy()
HEADS = Strategy("kv_heads@tp hidden@tp vocab@tp")
HEAD_DIM = Strategy("head_dim@tp hidden@tp vocab@tp")
KV_REPLICATED = Strategy("kv_heads@kv q_per_kv@rep hidden@kv,rep vocab@kv,rep")
HEADS_X_HEAD_DIM = Strategy("kv_heads@kv head_dim@rep hidden@kv,rep vocab@kv,rep")
HEADS_X_KV_SEQ = Strategy("kv_heads@kv kv_seq@rep hidden@kv,rep vocab@kv,rep")
SEQUENCE_PARALLEL = Strategy("kv_heads@tp hidden@tp vocab@tp tokens@tp")
EXPERTS = Strategy("kv_heads@tp experts@tp vocab@tp")

# The strategies that split something, by name.
NAMED = {
    "heads": HEADS,
    "sequence_parallel": SEQUENCE_PARALLEL,
    "head_dim": HEAD_DIM,
    "kv_replicated": KV_REPLICATED,
    "heads_x_head_dim": HEADS_X_HEAD_DIM,
    "heads_x_kv_seq": HEADS_X_KV_SEQ,
    "experts": EXPERTS,
}
