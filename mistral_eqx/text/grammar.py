"""Grammars that answers follow, by token masks of the llguidance library."""

import importlib.util
import json
import math
import re
import threading
import weakref
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, final

import numpy as np
from jaxtyping import Bool

from ..checks import checked
from ..documents import parse_json, shown
from ..errors import InputError
from .json_types import to_json_types
from .tokenizer import AbstractTokenizer


# The most characters of a schema, pattern or grammar.
LONGEST = 2**16
# The automaton of a multiple has a state for each remainder, and that of several in one number for those of their least
# common multiple.
_MOST_REMAINDERS = 10_000
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([\d.eE+-]+)')
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
# JSON may have whitespace where the standard allows it, but an answer must come to its end. These options replace those
# of a schema, which could have keywords ignored.
_JSON = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}", "coerce_one_of": False, "lenient": False}
# Text that leaves no choice is masked as any other. Otherwise llguidance would have it encoded, and would allow wrong
# tokens if the vocabulary has none for it.
_OPTIONS = '%llguidance {"no_forcing": true}'
# What a hostile grammar may cost: tests/test_text_grammar.py has some. The time of `a?a?a?...` is the square of the
# first of these numbers: seconds for 20,000, and half a minute for llguidance's own 1,000,000.
_LIMITS = {
    "initial_lexer_fuel": 20_000,
    "max_items_in_row": 2_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class GrammarGuide:
    """Which tokens may come next in one answer that follows a grammar."""

    def __init__(self, grammar: "Grammar", matcher: Any):
        self._grammar, self._matcher = grammar, matcher

    def allowed(self) -> Bool[np.ndarray, " vocab"]:
        """Which tokens may come next.

        Where the answer may end, these are the end tokens too; where it must end, no others.

        **Raises:** `ValueError` if the rest of the grammar cannot be followed: it is too complex, or the vocabulary has
        no tokens for it.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise InputError(
                f"The grammar cannot be followed any further ({_reason(self._matcher.get_error())}); simplify it."
            )
        mask = np.unpackbits(bits, count=self._grammar.vocab, bitorder="little").view(bool)
        if self._may_end():
            mask[list(self._grammar.eos_ids)] = True
        return mask

    def push(self, id: int):
        """Adds the next token.

        **Raises:** `ValueError` if the token is not allowed, or if what follows it is too complex.
        """
        # llguidance knows one end token.
        known = self._grammar.eos_ids[0] if id in self._grammar.eos_ids and self._may_end() else id
        if not 0 <= known < self._grammar.vocab or not self._matcher.consume_token(known):
            reason = _reason(self._matcher.get_error() or "it is not allowed")
            raise InputError(
                f"The token {id} cannot follow here ({reason}); push one that is allowed, or simplify the grammar."
            )

    def _may_end(self) -> bool:
        return self._matcher.is_stopped() or self._matcher.is_accepting()


@final
class Grammar:
    """What an answer must be: JSON of a schema, a match of a regular expression, or a text of a grammar.

    ```python
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    grammar = mx.Grammar.json_schema(tokenizer, schema)
    sampler = mx.Sampler(processors=[mx.Guided(grammar)])
    out = mx.generate(model, "A dog of seven years as JSON:", tokenizer=tokenizer, sampler=sampler)
    ```

    The library [llguidance](https://github.com/guidance-ai/llguidance) computes which tokens may come next. Text is
    compared, not tokens: a token may end in the middle of a word of the grammar, or of a character. Control tokens are
    never part of the text, unless a grammar names them.

    Make one with a class method. All of them raise `ValueError` if llguidance is not installed, if the tokenizer has no
    end token, or if the grammar is wrong, too large or too complex.

    **Attributes:**

    - `source`: the grammar as llguidance reads it.
    - `vocab`: the number of the tokenizer's tokens.
    - `eos_ids`: its end tokens, with which an answer ends.
    """

    source: str
    vocab: int
    eos_ids: tuple[int, ...]

    def __init__(self, tokenizer: AbstractTokenizer, source: str, name: str):
        """**Arguments:**

        - `tokenizer`: the model's tokenizer.
        - `source`: the grammar in llguidance's form of Lark.
        - `name`: what the user gave, for messages, such as `"The JSON schema"`.
        """
        library = _library()
        self.source, self.vocab, self.eos_ids = f"{source}\n{_OPTIONS}", tokenizer.vocab, tokenizer.eos_ids
        limits = library.LLParserLimits(**_LIMITS)
        self._matcher = library.LLMatcher(_lltokenizer(tokenizer), self.source, log_level=0, limits=limits)
        self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise InputError(
                f"{name} is wrong, too complex, or has parts that are not supported "
                f"({_reason(self._matcher.get_error())}); change these parts."
            )

    @classmethod
    def json_schema(cls, tokenizer: AbstractTokenizer, schema: Mapping[str, Any] | str) -> "Grammar":
        """JSON that a schema accepts.

        **Arguments:**

        - `tokenizer`: the model's tokenizer.
        - `schema`: a JSON schema (draft 2020-12), or its text. Properties come in the order of the schema. Unsupported
            keywords are refused.
        """
        name = "The JSON schema"
        if isinstance(schema, str):
            schema = parse_json(schema, name, remedy="correct it")
        if not isinstance(schema, Mapping):
            raise InputError(f"{name} is {shown(schema)}; give a dict, such as {{'type': 'object'}}.")
        return cls(tokenizer, _with_few_remainders(f"start: {json_rule(schema)}", name), name)

    @classmethod
    def json_object(cls, tokenizer: AbstractTokenizer) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema(tokenizer, {"type": "object"})

    @classmethod
    def regex(cls, tokenizer: AbstractTokenizer, pattern: str) -> "Grammar":
        """A text that a regular expression matches as a whole.

        **Arguments:**

        - `tokenizer`: the model's tokenizer.
        - `pattern`: an expression in [Rust's syntax](https://docs.rs/regex/latest/regex/#syntax), which is that of
            Python without references and without assertions about the text before or after.
        """
        name = "The regular expression"
        return cls(tokenizer, f"start: /{_library().regex_to_lark(_checked(pattern, name))}/", name)

    @classmethod
    def lark(cls, tokenizer: AbstractTokenizer, text: str) -> "Grammar":
        """A text of a context-free grammar.

        **Arguments:**

        - `tokenizer`: the model's tokenizer.
        - `text`: the grammar in [llguidance's form of
            Lark](https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md), with a rule `start`.
        """
        return cls(tokenizer, _with_few_remainders(text, "The grammar"), "The grammar")

    def guide(self) -> GrammarGuide:
        """Which tokens may come next, at the beginning of an answer."""
        return GrammarGuide(self, self._matcher.deep_copy())


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON that a schema accepts, as the right side of a rule of [`mistral_eqx.Grammar.lark`][]."""
    content = to_json_types(dict(schema), "The values of the JSON schema")
    return f"%json {json.dumps(content | {'x-guidance': _JSON})}"


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: AbstractTokenizer):
        self.tokens = [tokenizer.token_bytes(id, first=False) for id in range(tokenizer.vocab)]
        self.special_token_ids = [id for id in tokenizer.special_ids if id < tokenizer.vocab]
        self.eos_token_id, self.bos_token_id = tokenizer.eos_ids[0], tokenizer.bos_id

    def __call__(self, text: str) -> list[int]:
        """Would encode the text that a grammar forces."""
        raise NotImplementedError


_LOCK = threading.Lock()
_LLTOKENIZERS: weakref.WeakKeyDictionary[AbstractTokenizer, Any] = weakref.WeakKeyDictionary()


def _lltokenizer(tokenizer: AbstractTokenizer) -> Any:
    """llguidance's form of a tokenizer, which takes a while to make."""
    if not tokenizer.eos_ids:
        raise InputError(f"{tokenizer.name} has no end token, so an answer could not end; give another tokenizer.")
    with _LOCK:
        if tokenizer not in _LLTOKENIZERS:
            vocabulary: Any = _Vocabulary(tokenizer)
            _LLTOKENIZERS[tokenizer] = _library().LLTokenizer(vocabulary)
        return _LLTOKENIZERS[tokenizer]


def _library() -> Any:
    if importlib.util.find_spec("llguidance") is None:
        raise InputError(
            "Grammars need the library llguidance, which is not installed; run pip install 'mistral-eqx[serve]'."
        )
    import llguidance

    return llguidance


def _with_few_remainders(source: Any, name: str) -> str:
    source = _checked(source, name)
    try:
        multiples = _MULTIPLE.findall(_ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), source))
        digits = [Decimal(multiple).normalize().as_tuple().digits for multiple in multiples]
    except InvalidOperation:
        digits = []
    # Few digits at first: the least common multiple of long numbers takes a while too.
    short = max(map(len, digits), default=0) < 6
    if not short or math.lcm(*(int("".join(map(str, one))) for one in digits)) > _MOST_REMAINDERS:
        raise InputError(
            f"The least common multiple of the digits of all multipleOf in {name.replace('The', 'the')} is more than "
            f"{_MOST_REMAINDERS:,}; leave some out."
        )
    return source


def _checked(source: Any, name: str) -> str:
    source = checked(source, str, name)
    if len(source) > LONGEST:
        raise InputError(f"{name} has {len(source):,} characters; give one of at most {LONGEST:,}.")
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} has half a surrogate pair, which is not a character; leave it out.") from error
    return source


def _reason(error: str) -> str:
    if error.startswith("NoExtension"):
        return "the vocabulary has no tokens for what must come next"
    return shown(" ".join(error.split()), 160)
