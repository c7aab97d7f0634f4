"""What devices exchange in a step of training, in closed form: nothing is traced or compiled."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
from jax.typing import DTypeLike

from ..config import MistralConfig
from ..errors import InputError
from ..parallel import Strategy
from .communication import Collective, Ledger
from .training import Training


def training_step(
    config: MistralConfig,
    strategy: Strategy,
    axes: Mapping[str, int],
    *,
    batch: int,
    training: Training,
    dtype: DTypeLike = jnp.bfloat16,
) -> list[Collective]:
    """What one step of [`mistral_eqx.train.make_step`][] exchanges: forward and backward, gradients, and their norm.

    **Arguments:**

    - `config`, `strategy`, `axes`: as of [`mistral_eqx.planning.forward_pass`][].
    - `batch`: rows, all devices and all parts together.
    - `training`: their length, the stage of ZeRO, and in how many parts they are gone through.
    - `dtype`: of the forward and the backward pass. Weights, and the gradients that are added up after it, are float32.

    **Returns:** the exchanges. The devices that share a batch sum up gradients once a step in the stages 0 and 1, and
    once a part in the others.

    **Raises:** `ValueError` if the strategy does not fit the config or the axes, the rows cannot be cut, or it splits
    `embed`, or both `head_dim` and `kv_seq`, or `tokens` over other axes than the heads, for which there is no closed
    form here.
    """
    if batch % training.accumulate:
        raise InputError(f"A batch of {batch} cannot be cut into {training.accumulate} parts; take a multiple of that.")
    ledger = _TrainingLedger(config, strategy, axes, batch // training.accumulate, dtype, training)
    ledger.check()
    ledger.forward()
    if training.remat != "none":
        ledger.again()
    ledger.backward()
    ledger.entries = [dataclasses.replace(entry, count=entry.count * training.accumulate) for entry in ledger.entries]
    ledger.state()
    return ledger.entries


@dataclasses.dataclass(frozen=True)
class _Weight:
    """Arrays of one shape, as many as there are; those of blocks are stacked."""

    name: str
    dims: str
    arrays: int
    layers: int
    uses: int = 1


class _TrainingLedger(Ledger):
    """Writes down a step's exchanges. The gradient of what is the same on some devices is added up over them."""

    def __init__(
        self,
        config: MistralConfig,
        strategy: Strategy,
        axes: Mapping[str, int],
        batch: int,
        dtype: DTypeLike,
        training: Training,
    ):
        super().__init__(config, strategy, axes, batch, dtype)
        self.training, self.tokens = training, self.rows * training.seq
        self.dealt = self.scattered(training.seq) > 1
        self.kv_seq = -(-training.seq // self.parts("kv_seq"))

    def check(self):
        """Refuses what is not in the form."""
        axes = self.strategy.axes
        heads = set(axes("kv_heads head_dim"))
        if self.parts("embed") > 1 or (axes("head_dim") and axes("kv_seq")) or not set(axes("tokens")) <= heads:
            raise InputError(
                f"There is no closed form of a training step under {self.strategy.layout!r}; take a strategy with a "
                "name, or count the exchanges of a plan."
            )

    def forward(self):
        """What the forward pass exchanges, and the loss of each token."""
        self.model(self.training.seq, self.kv_seq, logits=0)
        self.sum("largest logit", "vocab", 1, self.tokens, self.wide)
        self.sum("sum of exponentials, target and whether it is first", "vocab", 1, 3 * self.tokens, self.wide)

    def again(self):
        """What is exchanged again since the backward pass computes a turn of blocks again: all but its last sum."""
        seq, layers, heads = self.training.seq, self.config.layers, self.local("kv_heads q_per_kv")
        self.all_tokens("attention input again", layers, seq)
        self.sum("attention scores again", "head_dim", layers, self.tokens, heads, self.kv_seq, self.wide)
        self.sum("softmax maximum again", "kv_seq", layers, self.tokens, heads, self.wide)
        head_dim = self.local("head_dim") + 1
        self.sum("softmax sum and values again", "kv_seq", layers, self.tokens, heads, head_dim, self.wide)
        self.all_tokens("feed-forward input again", layers, seq)
        if self.training.remat == "dots":
            return  # results of linear layers are kept, after they were added up
        self.sum_tokens("attention output again", "kv_heads q_per_kv head_dim", layers, seq)
        between = layers - layers // _turn(self.config)
        if between:
            self.sum_tokens("feed-forward output again", "hidden", between, seq)

    def backward(self):
        """The gradients of activations, and of norms where each device has tokens of its own."""
        layers, stream = self.config.layers, self.tokens * self.config.embed * self.narrow
        heads, head_dim = self.local("kv_heads q_per_kv"), self.local("head_dim")
        self.sum("gradient of the last output", "vocab", 1, stream)
        for what, dims, maps in (
            ("of the feed-forward input", "hidden", 2),
            ("of the queries' input", "kv_heads q_per_kv head_dim", 1),
            ("of the keys' and values' input", "kv_heads head_dim", 2),
        ):
            if not self.dealt:
                self.sum(f"gradient {what}", dims, maps * layers, stream)
        if self.dealt:
            devices = self.parts("tokens")
            # An all-gather's gradient is a reduce-scatter, and the reverse.
            self.write("reduce_scatter", "gradient of inputs", devices, (2 * layers, stream))
            self.write("all_gather", "gradient of outputs", devices, (2 * layers + 1, stream // devices))
            size = self.config.embed * self.narrow
            self.write("all_reduce", "gradient of norms", devices, (2 * layers + 1, size))
        # Scores are the same on all devices that split head_dim, and meet values that are not.
        self.sum("gradient of the softmax", "head_dim", layers, self.tokens, heads, self.kv_seq, self.narrow)
        self.sum("gradient of the softmax sum", "head_dim", layers, self.tokens, heads, self.wide)
        self.sum("gradient of queries", "kv_seq", layers, self.tokens, heads, head_dim, self.narrow)
        keys = self.rows * self.local("kv_heads") * head_dim * self.narrow
        padded = self.kv_seq * self.parts("kv_seq")
        self.sum("gradient of keys and values", "kv_seq", 2 * layers, keys, padded)
        self.sum("gradient of shared keys and values", "q_per_kv", 2 * layers, keys, self.kv_seq)

    def state(self):
        """What is exchanged for the weights, and the sums over all rows."""
        zero, parts = self.training.zero, self.training.accumulate
        devices = self.parts("batch")
        sets: set[tuple[str, ...]] = set()
        for weight in self.weights():
            sizes = [self.local(dim) for dim in weight.dims.split()]
            numbers, cut = math.prod(sizes), any(size % devices == 0 for size in sizes)
            stacked = weight.arrays * max(weight.layers, 1)
            count, whole = weight.arrays, 4 * numbers * max(weight.layers, 1)
            name, is_cut = f"of {weight.name}", zero and cut
            axes = set(self.strategy.axes(weight.dims))
            sets.add(tuple(sorted(axes | set(self.strategy.axes("batch") if is_cut else ()))))
            if zero < 2:
                self.write("all_reduce", f"gradient {name}", devices, (count, whole))
            elif zero == 2:
                kind = "reduce_scatter" if cut else "all_reduce"
                self.write(kind, f"gradient {name}", devices, (parts * count, whole))
            else:
                kind, light = "reduce_scatter" if cut else "all_reduce", numbers * self.narrow
                self.write(kind, f"gradient {name}", devices, (parts * stacked * weight.uses, light))
                times = 2 if weight.layers else weight.uses
                if cut:
                    self.write("all_gather", name, devices, (parts * stacked * times, light // devices))
            if is_cut and zero < 3:
                self.write("all_gather", name, devices, (count, whole // devices))
        for axes in sorted(sets):
            self.write("all_reduce", "squares of gradients", math.prod(self.axes[axis] for axis in axes), (1, 4))
        self.write("all_reduce", "weight of all rows, and sums of the loss", devices, (5, 4))

    def weights(self) -> Iterator[_Weight]:
        """All that are trained."""
        turn = _turn(self.config)
        each = self.config.layers // turn
        queries = "kv_heads q_per_kv head_dim embed"
        yield _Weight("queries' and output maps", queries, 2 * turn, each)
        yield _Weight("keys' and values' maps", "kv_heads head_dim embed", 2 * turn, each)
        yield _Weight("feed-forward maps", "hidden embed", 3 * turn, each)
        yield _Weight("norms", "embed", 2 * turn, each)
        yield _Weight("last norm", "embed", 1, 0)
        if self.config.tied:
            yield _Weight("table", "vocab embed", 1, 0, uses=2)
        else:
            yield _Weight("table and head", "vocab embed", 2, 0)


def _turn(config: MistralConfig) -> int:
    """After how many layers the blocks' windows repeat."""
    windows, layers = config.windows, config.layers
    return next(
        size for size in range(1, layers + 1) if layers % size == 0 and windows == windows[:size] * (layers // size)
    )
