"""Shows what the model generates during training."""

from collections.abc import Callable

from ...checks import Count, check_arguments
from ...nn import Mistral
from ..callback import Callback, Run
from ..step import Metrics


class Samples(Callback):
    """Calls a function with the model every `every` steps, for example to generate and print.

    ```python
    def show(model: mx.Mistral):
        out = mx.generate(model, [prompt], max_new_tokens=32, tokenizer=tokenizer)
        print(out.texts[0])


    trainer = mx.Trainer(optimizer, callbacks=[mx.train.Samples(show, every=100)])
    ```

    **Arguments:**

    - `show`: the function.
    - `every`: the number of steps between two calls; there is also a call before the first step and after the last.
    """

    def __init__(self, show: Callable[[Mistral], object], *, every: Count):
        check_arguments(Samples.__init__, every=every)
        self._show, self._every = show, every
        self._shown_step: int | None = None

    def on_start(self, run: Run):
        self._show_once(run)

    def on_step(self, run: Run, metrics: Metrics):
        if run.step % self._every == 0:
            self._show_once(run)

    def on_end(self, run: Run):
        self._show_once(run)

    def _show_once(self, run: Run):
        if run.step != self._shown_step:
            self._shown_step = run.step
            self._show(run.model())
