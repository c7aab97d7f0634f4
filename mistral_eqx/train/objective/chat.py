"""Say what the assistant says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import InputError
from ..batch import Example
from .causal import causal


def chat(messages: Sequence[Mapping[str, Any]], encode: Callable[..., list[int]]) -> Example:
    """Supervised learning of a conversation: only what the assistant says counts, and the token that ends it.

    ```python
    chat(messages, functools.partial(mx.encode_chat, tokenizer))
    ```

    What the assistant says is found with the template: it is what a message adds to the conversation before it that
    waits for an answer.

    **Arguments:**

    - `messages`: in order, each a dict with `"role"` and `"content"`.
    - `encode`: gives the ids of messages; with `add_generation_prompt=True`, as if the assistant were to speak next.

    **Raises:** `ValueError` if the assistant says nothing, or the template rewrites a turn once another follows.
    """
    ids = encode(messages, add_generation_prompt=False)
    learned = [0.0] * len(ids)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant" and number > 0]
    if not turns:
        raise InputError("No message but the first is the assistant's, so there is nothing to learn; give an answer.")
    for number in turns:
        before = encode(messages[:number], add_generation_prompt=True)
        after = encode(messages[: number + 1], add_generation_prompt=False)
        if after[: len(before)] != before or ids[: len(after)] != after:
            raise InputError(
                f"The chat template writes what comes before message {number} otherwise when it is answered or more "
                "follows, so the assistant's words cannot be told apart; learn each answer as a conversation of its "
                "own, or give a template that only adds to what it wrote."
            )
        learned[len(before) : len(after)] = [1.0] * (len(after) - len(before))
    return causal(ids, learned)
