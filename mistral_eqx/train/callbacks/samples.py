"""See what the model says by now."""

from collections.abc import Callable

from ...checks import Count, check_arguments
from ...nn import Mistral
from ..callback import Callback, Run
from ..step import Metrics


class Samples(Callback):
    """Calls a function with the model every so many steps, such as one that generates and prints.

    ```python
    def show(model: mx.Mistral):
        out = mx.generate(model, [prompt], max_new_tokens=32, tokenizer=tokenizer)
        print(out.texts[0])


    trainer = mx.Trainer(optimizer, callbacks=[mx.train.Samples(show, every=100)])
    ```

    **Arguments:**

    - `show`: what to do.
    - `every`: after how many steps; also before the first one and after the last.
    """

    def __init__(self, show: Callable[[Mistral], object], *, every: Count):
        check_arguments(Samples.__init__, every=every)
        self._show, self._every = show, every
        self._shown: int | None = None

    def on_start(self, run: Run):
        self._once(run)

    def on_step(self, run: Run, metrics: Metrics):
        if run.step % self._every == 0:
            self._once(run)

    def on_end(self, run: Run):
        self._once(run)

    def _once(self, run: Run):
        if run.step != self._shown:
            self._shown = run.step
            self._show(run.model())
