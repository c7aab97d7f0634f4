"""A model and its tokenizer, from one name."""

import os

from jax.sharding import Mesh
from jax.typing import DTypeLike

from .checkpoint import load
from .checkpoint.loading import Progress
from .nn import Mistral
from .parallel import SINGLE, Strategy
from .quant import Recipe
from .text import load_tokenizer
from .text.tokenizer import AbstractTokenizer


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    check: bool = False,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    strategy: Strategy = SINGLE,
    quantize: Recipe | None = None,
) -> tuple[Mistral, AbstractTokenizer]:
    """Loads a model and its tokenizer.

    ```python
    model, tokenizer = mx.from_pretrained("smollm2-135m")
    ```

    **Arguments:** those of [`mistral_eqx.load`][].

    **Returns:** what [`mistral_eqx.load`][] and [`mistral_eqx.load_tokenizer`][] return.

    **Raises:** `ValueError` as these two do.
    """
    tokenizer = load_tokenizer(path)
    model = load(path, dtype=dtype, check=check, progress=progress, mesh=mesh, strategy=strategy, quantize=quantize)
    return model, tokenizer
