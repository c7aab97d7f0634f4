"""Typed access to the keys of a checkpoint's config, which refuses keys that nothing reads."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..checks import CountOrZero, checked
from ..config import MistralConfig, Routing
from ..documents import shown
from ..errors import InputError


REQUIRED: Any = object()


# Why kinds of models and of rotary embeddings are refused, in whichever key a dialect has them.
_STATE = " because it has a state in place of attention"
_LENGTH = " because its angles depend on the length of the whole sequence, and keys in the cache keep theirs"
REASONS = {"mamba": _STATE, "mamba2": _STATE, "dynamic": _LENGTH, "longrope": _LENGTH}


class Settings:
    """The keys and values of a config. `take` checks the type of a value, `refuse_rest` refuses the keys not taken."""

    def __init__(self, settings: Mapping[str, Any], kind: str, file: str | os.PathLike[str] | None):
        self.name = kind if file is None else repr(os.fspath(file))
        self.file = file
        if not isinstance(settings, Mapping):
            raise self.wrong(None, f"{self.name} is {shown(settings)}; it must be a table of keys and values.")
        self._settings = settings
        self._taken: set[str] = set()

    def wrong(self, key: str | None, sentence: str) -> InputError:
        """The error about a key."""
        return InputError(sentence, file=self.file, key=key)

    def take(self, key: str, kind: Any, default: Any = REQUIRED) -> Any:
        """The value of a key, checked against its type, or its default."""
        self._taken.add(key)
        if key not in self._settings:
            if default is REQUIRED:
                raise self.wrong(
                    key, f"{self.name} lacks the key {key}, without which the model cannot be built; add it."
                )
            return default
        return self.checked(key, self._settings[key], kind)

    def checked(self, key: str, value: Any, kind: Any) -> Any:
        """A value of a key, checked against a type."""
        return checked(value, kind, f"The key {key} of {self.name}", file=self.file, key=key)

    def ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """The value of a key that holds one token id or several."""
        value = self.take(key, CountOrZero | list[CountOrZero] | None, default)
        return () if value is None else (value,) if isinstance(value, int) else tuple(value)

    def expect(self, key: str, supported: tuple[Any, ...], default: Any, kind: Any = Any):
        """Refuses a value that requires a computation that this package does not support."""
        value = self.take(key, kind, default)
        if not any(type(value) is type(one) and value == one for one in supported):
            named = listed(value for value in supported if value is not None)
            reason = REASONS.get(value, "") if isinstance(value, str) else ""
            raise self.wrong(
                key, f"{self.name} has {key} {shown(value)}, which is not supported{reason}; supported is {named}."
            )

    def make(self, **fields: Any) -> MistralConfig:
        """Makes the config. An error about its fields becomes an error about the file."""
        with self.naming():
            return MistralConfig(**fields)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Names the file in errors that do not."""
        try:
            yield
        except InputError as error:
            if self.name in str(error):
                raise
            raise InputError(f"{self.name} cannot be used: {error}", file=self.file, key=error.key) from error

    def refuse(self, key: str, value: object) -> InputError:
        """The error about a key that requires a computation that this package does not support."""
        return self.wrong(
            key,
            f"{self.name} sets {key} to {shown(value)}, which this package does not compute; use a checkpoint "
            "without it, or delete the key if it does not change the model.",
        )

    def refuse_rest(self, without_effect: frozenset[str], prefix: str = ""):
        """Refuses the keys that were not taken, unless they have no effect or are switched off."""
        for key, value in self._settings.items():
            known = key in self._taken or key in without_effect
            if not key.startswith(prefix) or key.startswith("_") or known:
                continue
            if not is_off(value):
                raise self.refuse(key, value)


def is_off(value: Any) -> bool:
    """Whether a value switches off the feature of its key."""
    return value is None or value is False or value in (0, "", [], {})


def listed(values: Any) -> str:
    """The values as an enumeration in a sentence."""
    texts = [repr(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else "none"


def per_head(embed: int, heads: int, document: Settings) -> int:
    """The size of a head, for a config without `head_dim`."""
    if embed % heads:
        raise document.wrong(
            "head_dim",
            f"{document.name} gives no head_dim, and its width {embed} does not divide among {heads} heads; add "
            "head_dim.",
        )
    return embed // heads


def per_kv(heads: int, kv_heads: int, document: Settings) -> int:
    """The number of query heads for each key/value head."""
    if heads % kv_heads:
        raise document.wrong(
            None,
            f"{document.name} has {heads} query heads and {kv_heads} key/value heads, but the first number must be a "
            "multiple of the second.",
        )
    return heads // kv_heads


def consistent_value(spellings: Mapping[str, Any], document: Settings, default: Any) -> Any:
    """The value that all spellings of a setting have, or `default` if none has a value. Refuses a contradiction."""
    given = {key: value for key, value in spellings.items() if value is not None}
    if len(set(given.values())) > 1:
        contradiction = " and ".join(f"{key} {shown(value)}" for key, value in given.items())
        raise document.wrong(
            next(iter(given)), f"{document.name} has {contradiction}, which contradict each other; keep the right one."
        )
    return next(iter(given.values()), default)


def read_routing(document: Settings, experts: int | None, per_token: int | None, key: str) -> Routing | None:
    """The routing of a model with experts; `None` for a dense one.

    **Arguments:**

    - `experts`, `per_token`: the values of the config's keys, if they are there.
    - `key`: the key of `per_token`.
    """
    if experts is None and per_token is None:
        return None
    if experts is None or per_token is None:
        raise document.wrong(
            key, f"{document.name} gives only one of the number of experts and {key}; add the other one."
        )
    try:
        return Routing(experts, per_token)
    except InputError as error:
        raise InputError(f"{document.name} cannot be used: {error}", file=document.file, key=key) from error
