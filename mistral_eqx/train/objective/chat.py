"""Supervised fine-tuning on conversations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..batch import Example
from .causal import causal


def chat(messages: Sequence[Mapping[str, Any]], encode: Callable[..., tuple[list[int], list[bool]]]) -> Example:
    """Predicts the answers of the assistant in a conversation, each with its end token; nothing else has weight.

    ```python
    chat(messages, functools.partial(mx.encode_chat, tokenizer))
    ```

    The chat template says which text is an answer: the text inside its `generation` blocks. A template without such
    blocks renders the conversation before the message with a generation prompt, and the answer is what the message
    adds. Prompt and answer are encoded separately, as in generation.

    **Arguments:**

    - `messages`: the messages in order, each a dict with `"role"` and `"content"`.
    - `encode`: [`mistral_eqx.encode_chat`][mistral_eqx.text.encode_chat] of a tokenizer, or a function that takes the
        same arguments.

    **Raises:** `InputError` if there is no answer, or the template renders a message differently once another follows.
    """
    ids, learned = encode(messages, add_generation_prompt=False, assistant_mask=True)
    return causal(ids, [float(is_answer) for is_answer in learned])
