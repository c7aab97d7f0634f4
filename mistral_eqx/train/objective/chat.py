"""Say what the assistant says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..batch import Example
from .causal import causal


def chat(messages: Sequence[Mapping[str, Any]], encode: Callable[..., tuple[list[int], list[bool]]]) -> Example:
    """Supervised learning of a conversation: only what the assistant says counts, and the token that ends it.

    ```python
    chat(messages, functools.partial(mx.encode_chat, tokenizer))
    ```

    What the assistant says is found with the template: what it puts between its marks of generation or, without these,
    what a message adds to the conversation before it that waits for an answer. Prompt and answer are encoded apart, as
    when the model answers, so an answer may begin with anything.

    **Arguments:**

    - `messages`: in order, each a dict with `"role"` and `"content"`.
    - `encode`: [`mistral_eqx.encode_chat`][mistral_eqx.text.encode_chat] of a tokenizer, or a function that takes the
        same arguments.

    **Raises:** `InputError` if the assistant says nothing, or the template rewrites a turn once another follows.
    """
    ids, learned = encode(messages, add_generation_prompt=False, assistant_mask=True)
    return causal(ids, [float(counts) for counts in learned])
