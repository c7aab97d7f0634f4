"""Where examples come from."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """Examples, or what an objective makes examples of, by number."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One of them; several threads may ask."""
        ...
