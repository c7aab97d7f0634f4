"""The interface of data sources."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """Examples, or the items that an objective makes examples of, by index."""

    def __len__(self) -> int:
        """The number of items."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """An item; several threads may call this at the same time."""
        ...
