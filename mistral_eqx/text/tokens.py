"""Protocols for token ids and for the tokenizer methods that decode them."""

from typing import Any, Protocol, SupportsIndex, runtime_checkable


@runtime_checkable
class Ids(Protocol):
    """Token ids in order: a list, or an integer array of one dimension."""

    def __len__(self) -> int:
        """The number of ids."""
        ...

    def __getitem__(self, at: Any, /) -> Any:
        """The id at a position."""
        ...


@runtime_checkable
class Tokens(Protocol):
    """The part of a tokenizer that turns ids into text one by one; see [`mistral_eqx.text.AbstractTokenizer`][]."""

    vocab: int

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that are never text."""
        ...

    def begins_text(self, after: Ids, *, skip_special: bool = True) -> bool:
        """Whether the next token begins a text."""
        ...

    def checked_id(self, id: SupportsIndex) -> int:
        """`id` as an int."""
        ...

    def token_bytes(self, id: int, *, first: bool) -> bytes:
        """The UTF-8 bytes of a token."""
        ...

    def token_name(self, id: int) -> str:
        """The text of a single token."""
        ...
