"""Every answer follows its grammar, with every kind of tokenizer."""

import dataclasses
import functools
import gc
import json
import os
import re
import weakref

import jax.random as jr
import jsonschema
import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.model import SMALL, small_model
from fixtures.text import tiny
from hypothesis import HealthCheck, given, settings, strategies as st
from test_text_tekken import small_tekken

import mistral_eqx as mx
from mistral_eqx import Grammar, Guided
from mistral_eqx.text import SentencePieceTokenizer, grammar as grammar_file, load_tokenizer


# `GRAMMAR_SCHEMAS=500` draws more.
MANY = int(os.environ.get("GRAMMAR_SCHEMAS", "100"))


def _gguf(folder, **metadata):
    return load_tokenizer(tiny.write_gguf(folder / "tiny.gguf", **metadata))


def _json(folder, write):
    write(folder)
    settings = {"eos_token": "</s>" if write is tiny.metaspace_json else "<|im_end|>"}
    tiny.write_json(folder / "tokenizer_config.json", settings)
    return load_tokenizer(folder)


KINDS = {
    "sentencepiece": lambda folder: SentencePieceTokenizer(tiny.sentencepiece_model(), name="tiny.model"),
    "gguf sentencepiece": lambda folder: _gguf(folder, **tiny.sentencepiece_metadata()),
    "gguf byte-level": lambda folder: _gguf(folder, **tiny.byte_level_metadata()),
    "byte-level": lambda folder: _json(folder, tiny.byte_level_json),
    "metaspace": lambda folder: _json(folder, tiny.metaspace_json),
    "tekken": lambda folder: load_tokenizer(tiny.write_json(folder / "tekken.json", small_tekken())),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return KINDS["byte-level"](tmp_path_factory.mktemp("tokenizer"))


def walk(grammar, draw, most=400):
    """An answer of random tokens, each as likely as the others that are allowed, without the end token."""
    guide, ids = grammar.guide(), []
    while len(ids) < most:
        token = int(draw.choice(np.flatnonzero(guide.allowed())))
        guide.push(token)
        if token in grammar.eos_ids:
            # Nothing but end tokens comes after the end.
            assert set(np.flatnonzero(guide.allowed())) == set(grammar.eos_ids)
            return ids
        ids.append(token)
    raise AssertionError("The answer did not end.")


def said(tokenizer, ids):
    """The text that goes on after an ordinary token."""
    return tokenizer.decode(ids, after=tokenizer.encode("a"), skip_special=False)


PATTERNS = [
    "[a-c]{0,9}",
    "(the|hello|hell)( the){0,3}",
    "[0-9]{3}-(a|b)\n",
    "[\u00e9\u5929\U0001f600]{1,5}x?",
    r"[^\u0000-\u007f]{2}",
    r"(?i:Hello)|\x41\n\t",
    ".{1,6}",
]


def test_a_match_of_a_pattern(tokenizer):
    draw = np.random.default_rng(0)
    for pattern in PATTERNS:
        grammar = Grammar.regex(tokenizer, pattern)
        for _ in range(8):
            text = said(tokenizer, walk(grammar, draw))
            assert re.fullmatch(pattern, text), (pattern, text)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["the", "h\u00e9\u5929", 1.5, None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def test_json_of_a_schema(tokenizer):
    draw = np.random.default_rng(1)
    grammar = Grammar.json_schema(tokenizer, SCHEMA)
    for _ in range(12):
        jsonschema.validate(json.loads(said(tokenizer, walk(grammar, draw, 2000))), SCHEMA)


def test_a_context_free_grammar(tokenizer):
    draw = np.random.default_rng(2)
    grammar = Grammar.lark(tokenizer, 'start: "(" start ")" | WORD\nWORD: /[ab]{1,3}/')
    for _ in range(12):
        text = said(tokenizer, walk(grammar, draw))
        depth = text.count("(")
        assert re.fullmatch("[ab]{1,3}", text.removeprefix("(" * depth).removesuffix(")" * depth))


def test_where_an_answer_may_end(byte_level):
    (a,) = byte_level.encode("a")
    ends = list(byte_level.eos_ids)
    guide = Grammar.regex(byte_level, "a{1,2}").guide()
    assert np.flatnonzero(guide.allowed()).tolist() == [a]
    guide.push(a)
    assert set(np.flatnonzero(guide.allowed())) == {a, *ends}
    guide.push(a)
    assert np.flatnonzero(guide.allowed()).tolist() == ends
    guide.push(ends[0])
    guide.push(ends[0])
    assert np.flatnonzero(guide.allowed()).tolist() == ends


def test_several_end_tokens_each_end_an_answer(byte_level, tmp_path):
    tokenizer = KINDS["gguf byte-level"](tmp_path)
    tokenizer.eos_ids = (2, 0)
    for end in (2, 0):
        guide = Grammar.regex(tokenizer, "a").guide()
        (a,) = tokenizer.encode("a")
        guide.push(a)
        assert set(np.flatnonzero(guide.allowed())) == {0, 2}
        guide.push(end)
        assert set(np.flatnonzero(guide.allowed())) == {0, 2}


def test_a_token_that_does_not_follow_is_refused(byte_level):
    (a,), (b,) = byte_level.encode("a"), byte_level.encode("b")
    end = byte_level.eos_ids[0]
    for ids, wrong in (([], b), ([a], b), ([], end), ([a, end], a), ([], -1), ([], 10**6)):
        guide = Grammar.regex(byte_level, "ac?").guide()
        for id in ids:
            guide.push(id)
        with refused(f"The token {wrong} cannot follow here", "push one that is allowed"):
            guide.push(wrong)


def test_guides_do_not_know_of_each_other(byte_level):
    (a,), (b,) = byte_level.encode("a"), byte_level.encode("b")
    grammar = Grammar.regex(byte_level, "ab|ba")
    one, other = grammar.guide(), grammar.guide()
    one.push(a)
    other.push(b)
    assert np.flatnonzero(one.allowed()).tolist() == [b]
    assert np.flatnonzero(other.allowed()).tolist() == [a]
    assert set(np.flatnonzero(grammar.guide().allowed())) == {a, b}


def test_control_tokens_are_no_text_unless_they_are_named(byte_level):
    draw = np.random.default_rng(3)
    grammar = Grammar.regex(byte_level, r"(?s:.){0,20}")
    assert not any(set(walk(grammar, draw)) & byte_level.special_ids for _ in range(50))
    named = Grammar.lark(byte_level, 'start: <|im_start|> "a"')
    assert walk(named, draw) == [byte_level.control_tokens["<|im_start|>"], *byte_level.encode("a")]


def test_the_vocabulary_is_read_once_and_forgotten_with_its_tokenizer(tmp_path, monkeypatch):
    tokenizer = KINDS["byte-level"](tmp_path)
    guide = Grammar.regex(tokenizer, "a").guide()
    monkeypatch.setattr(type(tokenizer), "token_bytes", lambda *arguments, **options: pytest.fail("read again"))
    Grammar.regex(tokenizer, "b")
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None
    # A guide needs no tokenizer.
    assert guide.allowed().any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda it: Grammar.regex(it, "(a"), ["The regular expression is wrong"]),
        (lambda it: Grammar.regex(it, "(?=a)b"), ["The regular expression is wrong", "look"]),
        (lambda it: Grammar.regex(it, 5), ["The regular expression is 5", "must be a text"]),
        (lambda it: Grammar.regex(it, "\ud800"), ["half a surrogate pair"]),
        (lambda it: Grammar.regex(it, "a" * 70_000), ["characters", "at most 65,536"]),
        (lambda it: Grammar.lark(it, "start: missing"), ["The grammar is wrong", "missing"]),
        (lambda it: Grammar.lark(it, "begin: 'a'"), ["The grammar is wrong"]),
        (lambda it: Grammar.lark(it, None), ["The grammar is None"]),
        (lambda it: Grammar.json_schema(it, {"type": "strin"}), ["The JSON schema is wrong", "strin"]),
        (lambda it: Grammar.json_schema(it, {"not": {}}), ["The JSON schema is wrong", "not"]),
        (lambda it: Grammar.json_schema(it, {"$ref": "https://example.org/x"}), ["The JSON schema is wrong"]),
        (lambda it: Grammar.json_schema(it, {"type": "string", "format": "odd"}), ["The JSON schema is wrong", "odd"]),
        (lambda it: Grammar.json_schema(it, "{"), ["The JSON schema is not valid JSON", "correct it"]),
        (lambda it: Grammar.json_schema(it, [1]), ["The JSON schema is [1]", "give a dict"]),
        (lambda it: Grammar.json_schema(it, {"const": object()}), ["The values of the JSON schema"]),
        (lambda it: Grammar.json_schema(it, {"const": float("nan")}), ["The JSON schema"]),
    ],
)
def test_wrong_grammars_are_one_sentence(byte_level, make, words):
    with refused(*words):
        make(byte_level)


def test_a_schema_cannot_change_how_it_is_read(byte_level):
    loose = {"x-guidance": {"lenient": True, "whitespace_pattern": " +"}, "type": "array", "not": {}}
    with refused("The JSON schema is wrong", "not"):
        Grammar.json_schema(byte_level, loose)


def test_whitespace_has_an_end(byte_level):
    (space,) = byte_level.encode(" ")
    guide = Grammar.json_schema(byte_level, {"type": "array", "items": {"type": "null"}}).guide()
    guide.push(byte_level.encode("[")[0])
    count = 0
    while guide.allowed()[space]:
        guide.push(space)
        count += 1
    assert count == 16


def test_any_object(byte_level):
    grammar = Grammar.json_object(byte_level)
    assert np.flatnonzero(grammar.guide().allowed()).tolist() == byte_level.encode("{")
    guide, ids = grammar.guide(), byte_level.encode('{"a": [1, {"b": "\u00e9\\n"}], "c": -1.5e3, "d": {}}')
    for id in ids:
        assert guide.allowed()[id]
        guide.push(id)
    assert set(np.flatnonzero(guide.allowed())) == set(grammar.eos_ids)


def test_without_the_library_or_an_end_token(byte_level, tmp_path, monkeypatch):
    endless = KINDS["byte-level"](tmp_path)
    endless.eos_ids = ()
    with refused("has no end token"):
        Grammar.regex(endless, "a")
    monkeypatch.setattr(grammar_file.importlib.util, "find_spec", lambda name: None)
    with refused("llguidance, which is not installed", "pip install 'mistral-eqx[serve]'"):
        Grammar.regex(byte_level, "a")


@functools.lru_cache
def random_model(path):
    """A random model that costs little, with the tokenizer of the default preset."""
    tokenizer = load_tokenizer(path)
    sizes = {"vocab": tokenizer.vocab, "embed": 16, "hidden": 16, "layers": 1, "windows": (None,)}
    return small_model(config=dataclasses.replace(SMALL, **sizes, max_positions=4096)), tokenizer


def _optional_fields(count):
    return {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(count)}}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        # Each would take seconds to minutes, or gigabytes, with llguidance's own limits.
        pytest.param(lambda it: Grammar.regex(it, "[a-z0-9]?" * 7000), ["too complex"], id="optional"),
        pytest.param(lambda it: Grammar.regex(it, "a?" * 20_000), ["too complex"], id="more optional"),
        pytest.param(lambda it: Grammar.regex(it, "(" * 20_000 + ")" * 20_000), ["too complex"], id="parentheses"),
        pytest.param(lambda it: Grammar.regex(it, "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"), [], id="nested"),
        pytest.param(lambda it: Grammar.regex(it, ".*a.{500}b"), ["too many states"], id="states"),
        pytest.param(lambda it: Grammar.json_schema(it, _optional_fields(1500)), ["too big"], id="optional fields"),
        pytest.param(
            lambda it: Grammar.json_schema(it, {"type": "integer", "multipleOf": 999_983}),
            ["multipleOf"],
            id="multiple",
        ),
        pytest.param(
            lambda it: Grammar.json_schema(it, {"allOf": [{"type": "integer", "multipleOf": n} for n in (997, 991)]}),
            ["multipleOf", "10,000"],
            id="multiples",
        ),
        pytest.param(
            lambda it: Grammar.lark(it, 'start: %json {"type": "integer", "multiple\\u004ff": 999983}'),
            ["multipleOf in the grammar"],
            id="escaped",
        ),
        pytest.param(lambda it: Grammar.json_schema(it, {"$ref": "#"}), ["no tokens"], id="nothing"),
        pytest.param(lambda it: Grammar.json_schema(it, functools.reduce(_list_of, range(70), {})), ["64"], id="deep"),
    ],
)
def test_hostile_grammars_are_refused(smollm2_path, make, words):
    """In a second or two, most of them at once; some only where the answer comes to it."""
    with refused(*words):
        guide, draw = make(random_model(smollm2_path)[1]).guide(), np.random.default_rng(0)
        for _ in range(3000):
            guide.push(int(draw.choice(np.flatnonzero(guide.allowed()))))


def _list_of(items, _):
    return {"type": "array", "items": items}


@pytest.mark.parametrize(
    "make",
    [
        lambda it: Grammar.regex(it, "((a|a)*)*b{0,9}(a|b)*a(a|b){30}c?"),
        lambda it: Grammar.regex(it, "(.*a){20}.{0,100000}"),
        lambda it: Grammar.regex(it, "a{1000000}b"),
        lambda it: Grammar.json_schema(it, {"type": "array", "items": {"type": "string"}, "minItems": 10**6}),
        lambda it: Grammar.json_schema(
            it,
            {
                "$ref": "#/$defs/x15",
                "$defs": {"x0": {"type": "null"}}
                | {f"x{at}": {"anyOf": [{"$ref": f"#/$defs/x{at - 1}"}] * 10} for at in range(1, 16)},
            },
        ),
        lambda it: Grammar.lark(it, 'start: start start | "a" | '),
    ],
)
def test_what_only_looks_hostile_is_followed(smollm2_path, make):
    guide, draw = make(random_model(smollm2_path)[1]).guide(), np.random.default_rng(0)
    for _ in range(100):
        guide.push(int(draw.choice(np.flatnonzero(guide.allowed()))))


_NAMES = st.text('ab_ \u00e9\u5929"\\', max_size=4)
# The preset has no tokens for the bytes with which the characters after these begin.
_TEXTS = st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"]), max_size=4)
_SCALARS = st.none() | st.booleans() | st.integers(-1000, 1000) | _TEXTS


def _integers(low, span):
    return {"type": "integer", "minimum": low, "maximum": low + span}


def _strings(low, span):
    return {"type": "string", "minLength": low, "maxLength": low + span}


def _arrays(items, low, span):
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + span}


def _objects(properties, optional):
    required = [name for at, name in enumerate(properties) if at not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
    st.builds(_integers, st.integers(-2000, 2000), st.integers(0, 5000)),
    st.builds(_strings, st.integers(0, 3), st.integers(0, 6)),
    st.builds(lambda values: {"enum": values}, st.lists(_SCALARS, min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, _SCALARS | st.lists(_SCALARS, max_size=2)),
    st.sampled_from(
        [
            {"type": "string", "pattern": r"^[a-c]{2}\d?$"},
            {"type": "string", "format": "date"},
            {"type": "string", "format": "uuid"},
            {"type": "number", "minimum": -1, "exclusiveMaximum": 3, "multipleOf": 0.5},
        ]
    ),
)
_PLAIN = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.builds(_arrays, inner, st.integers(0, 1), st.integers(0, 2)),
        st.builds(_objects, st.dictionaries(_NAMES, inner, max_size=3), st.sets(st.integers(0, 2))),
        st.builds(lambda kinds: {"anyOf": kinds}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=4,
)
SCHEMAS = _PLAIN | st.builds(lambda one: _arrays({"$ref": "#/$defs/x"}, 0, 2) | {"$defs": {"x": one}}, _PLAIN)


def answers_parse(path, schema, seed, new=500):
    model, tokenizer = random_model(path)
    sampler = mx.Sampler(temperature=5.0, processors=[Guided(Grammar.json_schema(tokenizer, schema))])
    prompt = tokenizer.encode("Once")
    out = mx.generate(
        model,
        [prompt],
        max_new_tokens=new,
        sampler=sampler,
        eos_id=tokenizer.eos_ids,
        key=jr.key(seed),
        tokenizer=tokenizer,
    )
    assert int(out.lengths[0]) < new, "the answer did not end"
    jsonschema.validate(json.loads(out.texts[0]), schema, jsonschema.Draft202012Validator)


@settings(deadline=None, max_examples=5, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_every_answer_is_json_of_its_schema(smollm2_path, schema, seed):
    answers_parse(smollm2_path, schema, seed)


@settings(deadline=None, max_examples=MANY, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
@pytest.mark.slow
def test_every_answer_is_json_of_each_of_many_schemas(smollm2_path, schema, seed):
    answers_parse(smollm2_path, schema, seed)


def test_a_text_that_the_vocabulary_cannot_write_is_refused(smollm2_path):
    _, tokenizer = random_model(smollm2_path)
    with refused("no tokens for what must come next"):
        walk(Grammar.json_schema(tokenizer, {"const": "\U000a1603"}), np.random.default_rng(0))
    # Where there is another way, it is taken.
    draw = np.random.default_rng(0)
    grammar = Grammar.regex(tokenizer, "[\U000a1603a-z]{1,9}")
    for _ in range(20):
        assert re.fullmatch("[a-z]{1,9}", said(tokenizer, walk(grammar, draw)))
