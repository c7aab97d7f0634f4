"""An engine gives each request the tokens that `generate` gives for it alone, whatever the others do."""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import threading
import time

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import (
    TOKENIZER,
    VOCAB,
    count_compilations,
    near_model,
    random_prompts,
    refused,
    talking_model,
)
from fixtures.lora import adapted
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

import mistral_eqx as mx
from mistral_eqx.engine import Full, engine as engine_module
from mistral_eqx.engine.pace import Pace
from mistral_eqx.engine.prefix_cache import PrefixCache
from mistral_eqx.engine.proposing import Balance, History
from mistral_eqx.engine.ring import ring_capacity
from mistral_eqx.generation.proposals import look_up
from mistral_eqx.parallel import Strategy
from mistral_eqx.parallel.mesh import make_mesh


EXAMPLES = int(os.environ.get("ENGINE_EXAMPLES", "3"))
# Few of the tokens end a text, so that most have some length.
ENDS = (3, 17)
LOOKUP = mx.PromptLookup(tokens=3, ngram=1, cost=0.0)


def sampler_of(request):
    """The sampler of `generate` for the same tokens."""
    processors = []
    if request.repetition_penalty != 1:
        processors.append(mx.RepetitionPenalty(request.repetition_penalty))
    if request.presence_penalty:
        processors.append(mx.PresencePenalty(request.presence_penalty))
    if request.frequency_penalty:
        processors.append(mx.FrequencyPenalty(request.frequency_penalty))
    if request.logit_bias:
        processors.append(mx.LogitBias(request.logit_bias))
    if request.min_new_tokens:
        processors.append(mx.MinNewTokens(request.min_new_tokens))
    return mx.Sampler(
        request.temperature, request.top_k, request.top_p, request.min_p, request.typical_p, tuple(processors)
    )


def alone(model, request):
    """The tokens and the text of `generate`, and its log-probabilities."""
    out = mx.generate(
        model,
        [list(request.prompt)],
        max_new_tokens=request.max_new_tokens,
        sampler=sampler_of(request),
        eos_id=request.eos_ids,
        key=jr.fold_in(jr.key(request.seed or 0), request.sample),
        stop=request.stop,
        tokenizer=TOKENIZER,
        logprobs=request.logprobs,
    )
    length = int(out.lengths[0])
    return tuple(np.asarray(out.tokens[0, :length]).tolist()), out.texts[0], out


def requests_of(*options, lengths=(7, 1, 20, 33, 12), new=12, seed=0):
    """Requests with random prompts, one for each set of options."""
    lengths = [lengths[number % len(lengths)] for number in range(len(options))]
    prompts = random_prompts(*lengths, seed=seed)
    return [
        mx.Request(prompt, **{"max_new_tokens": new, "eos_ids": ENDS, "seed": number, **option})
        for number, (prompt, option) in enumerate(zip(prompts, options, strict=True))
    ]


@pytest.fixture(scope="module")
def model():
    return talking_model()


@contextlib.contextmanager
def engine_of(model, **options):
    with mx.Engine(model, TOKENIZER, **{"rows": 3, "context": 256, "chunk": 16} | options) as engine:
        yield engine


MIXED = [
    {},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 0.8, "top_p": 0.7, "seed": 2**32 - 1},
    {"min_p": 0.1, "sample": 3},
    {"typical_p": 0.6},
    {"repetition_penalty": 1.7, "frequency_penalty": 0.5, "presence_penalty": -0.4},
    {"logit_bias": {5: 4.0, 9: -np.inf}, "temperature": 1.0},
    {"min_new_tokens": 6, "logit_bias": {3: 50.0}},
    {"stop": ["b", "ca"], "temperature": 2.0},
    {"temperature": 3.0, "top_k": 2, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8},
    {"logprobs": 3, "temperature": 1.0},
    {"eos_ids": (), "max_new_tokens": 40},
]


@pytest.mark.parametrize(("stride", "options"), [(4, MIXED[::2]), pytest.param(1, MIXED, marks=pytest.mark.slow)])
def test_requests_get_the_tokens_that_they_get_alone(model, stride, options):
    requests = requests_of(*options)
    with engine_of(model, stride=stride) as engine:
        events = engine.run(requests)
        load = engine.load
    assert load.active == load.waiting == 0
    assert load.new_tokens >= sum(len(event.ids) for event in events)
    for request, event in zip(requests, events, strict=True):
        ids, text, _ = alone(model, request)
        assert event.ids == ids, request
        assert event.text == text, request
        assert event.finish == ("stop" if event.stopped or ids[-1] in request.eos_ids else "length")


def test_log_probabilities_are_those_of_generate(model):
    (request,) = requests_of({"logprobs": 4, "temperature": 1.0})
    with engine_of(model) as engine:
        (event,) = engine.run([request])
    ids, _, out = alone(model, request)
    assert [one.id for one in event.log_probs] == list(ids)
    # Float32 sums in another order.
    np.testing.assert_allclose([one.log_prob for one in event.log_probs], out.log_probs[0, : len(ids)], atol=1e-5)
    found = [[id for id, _ in one.top] for one in event.log_probs]
    np.testing.assert_array_equal(found, out.top_tokens[0, : len(ids)])


def test_nothing_is_compiled_after_it_was_warmed(model):
    with engine_of(model, rows=2) as engine:
        engine.warm()
        with count_compilations() as compiled:
            engine.run(requests_of(*MIXED[:-1], lengths=(9, 40)))
    assert not {"decode_rows", "enter", "resized", "read_chunk", "_take", "_put"} & {*compiled}


def test_a_step_computes_the_rows_that_are_needed(model, monkeypatch):
    rows, decode = [], engine_module.decode_rows

    def spied(kept, carried):
        rows.append(len(carried.tree[0].token))
        return decode(kept, carried)

    monkeypatch.setattr(engine_module, "decode_rows", spied)
    requests = requests_of({"max_new_tokens": 60, "eos_ids": ()}, *[{"eos_ids": ()}] * 2)
    with engine_of(model, rows=3) as engine:
        events = engine.run(requests)
    # All come while the first decodes, which is alone in the end.
    assert [count for count, _ in itertools.groupby(rows)] == [1, 2, 3, 2, 1]
    for request, event in zip(requests, events, strict=True):
        assert event.ids == alone(model, request)[0]


def test_a_chunk_takes_as_long_as_two_steps():
    pace = Pace(300)
    assert (pace.most, pace.size) == (288, 32)
    for _ in range(8):
        pace.step(0.01)
    sizes = []
    # A token takes a twentieth of a step, then a fifth.
    for token in [0.0005] * 5 + [0.002] * 4:
        pace.chunk(pace.size, pace.size * token)
        sizes.append(pace.size)
    assert sizes == [32, 32, 32, 32, 32, 16, 16, 16, 16]
    # A last chunk that is short says nothing of longer ones.
    pace.chunk(4, 0.001)
    assert pace.size == 16
    for _ in range(6):
        pace.chunk(pace.size, 0.001)
    assert pace.size == 288
    assert Pace(5).size == Pace(5).most == 5


@pytest.mark.slow
def test_the_ring_grows_turns_and_shrinks(model):
    long, short = requests_of(
        {"max_new_tokens": 4, "eos_ids": ()}, {"max_new_tokens": 330, "eos_ids": ()}, lengths=(700, 5)
    )
    sizes = []
    with engine_of(model, rows=2, stride=8, context=1024, chunk=64) as engine:
        answer = engine.submit(short)
        for number, event in enumerate(answer):
            ids = event.ids if number == 0 else (*ids, *event.ids)
            sizes.append(engine.load.slots)
            if number == 2:
                other = engine.submit(long)
        assert other.result().ids == alone(model, long)[0]
    # Room for the first new tokens, for the long prompt, for the rest.
    assert list(dict.fromkeys(sizes)) == [256, 1024, 512]
    assert ids == alone(model, short)[0]


def test_the_pointer_goes_round_many_times(model):
    requests = requests_of(*[{"eos_ids": ()}] * 40, lengths=(40, 5, 17), new=40)
    with engine_of(model, rows=2, stride=8) as engine:
        events = engine.run(requests)
        assert engine.load.slots == 256
    assert sum(len(event.ids) for event in events) == 1600
    for request, event in zip(requests[::7], events[::7], strict=True):
        assert event.ids == alone(model, request)[0]


def test_a_known_beginning_is_not_prefilled_again(model):
    first, other = random_prompts(100, 100)
    requests = [
        mx.Request(prompt, max_new_tokens=8, eos_ids=()) for prompt in (first, first, [*first[:70], *other], other)
    ]
    with engine_of(model) as engine:
        answers = []
        for request in requests:
            answers.append(engine.submit(request))
            assert answers[-1].result().ids == alone(model, request)[0]
        assert engine.load.cached_tokens == 96 + 64
        assert engine.load.prefix_bytes > 0
    assert [answer.cached for answer in answers] == [0, 96, 64, 0]


def test_the_prefix_cache_drops_what_was_not_used_for_longest(model):
    prompts = random_prompts(65, 65, 65)
    (size,) = {layer.k.nbytes * 2 for layer in mx.nn.Cache.init(model.config, 1, 32).layers}
    with engine_of(model, prefix_cache=4 * size * len(model.blocks)) as engine:
        for prompt in (0, 1, 0, 2, 0, 1):
            (answer,) = [engine.submit(mx.Request(prompts[prompt], max_new_tokens=1))]
            answer.result()
            last = answer.cached
            assert engine.load.prefix_bytes <= 4 * size * len(model.blocks)
            if prompt == 0:
                kept = answer.cached
    assert (kept, last) == (64, 0)


def test_a_prefix_cache_without_room_keeps_nothing():
    assert PrefixCache(32, 0).find([1] * 64) == []


def test_cancelled_and_late_requests_leave_others_alone(model):
    requests = requests_of(*[{"max_new_tokens": 60, "eos_ids": ()}] * 6)
    late = dataclasses.replace(requests[0], timeout=1e-6)
    with engine_of(model, rows=2) as engine:
        answers = [engine.submit(request) for request in [*requests, late]]
        answers[5].cancel()
        for number, _ in enumerate(answers[0]):
            if number == 3:
                answers[1].cancel()
        events = [answer.result() for answer in answers[1:]]
        assert engine.load.active == engine.load.waiting == 0
        assert engine.load.finished == {"length": 4, "cancelled": 2, "timeout": 1}
    assert [event.finish for event in events] == ["cancelled", "length", "length", "length", "cancelled", "timeout"]
    expected = alone(model, requests[1])[0]
    assert events[0].ids == expected[: len(events[0].ids)]
    for request, event in zip(requests[2:5], events[1:4], strict=True):
        assert event.ids == alone(model, request)[0]


def test_a_guide_allows_only_some_tokens(model):
    class Even:
        """A grammar, and a guide: even tokens, then an end."""

        def guide(self):
            return Even()

        def __init__(self):
            self.count = 0

        def allowed(self):
            ids = np.arange(VOCAB)
            return ids % 2 == 0 if self.count < 5 else ids == ENDS[0]

        def push(self, id):
            self.count += 1

    requests = [dataclasses.replace(request, grammar=Even()) for request in requests_of({}, {"temperature": 2.0})]
    with engine_of(model, stride=4) as engine:
        events = engine.run([*requests, *requests_of({})])
    for event in events[:2]:
        assert len(event.ids) == 6
        assert all(id % 2 == 0 for id in event.ids[:-1])
        assert event.ids[-1] == ENDS[0]
    assert events[2].ids == alone(model, requests_of({})[0])[0]


def test_a_full_queue_refuses_and_a_closed_engine_too(model):
    (request,) = requests_of({"max_new_tokens": 30, "eos_ids": ()})
    engine = mx.Engine(model, TOKENIZER, rows=1, context=64, queue=2)
    answers = []

    def fill():
        while len(answers) < 20:
            answers.append(engine.submit(request))

    with pytest.raises(Full, match="2 requests are waiting"):
        fill()
    engine.close(drain=True)
    assert {answer.result().finish for answer in answers} == {"length"}
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(request)
    engine.close()


def test_closing_ends_what_runs(model):
    (request,) = requests_of({"max_new_tokens": 200, "eos_ids": ()})
    before = threading.active_count()
    with engine_of(model, rows=1) as engine:
        answers = [engine.submit(request) for _ in range(3)]
    assert [answer.result().finish for answer in answers] == ["cancelled"] * 3
    assert threading.active_count() == before


def test_events_can_be_awaited(model):
    requests = requests_of({}, {"temperature": 1.0})

    async def ids_of(answer):
        return tuple([id async for event in answer for id in event.ids])

    async def both(engine):
        return await asyncio.gather(*(ids_of(engine.submit(request)) for request in requests))

    with engine_of(model) as engine:
        found = asyncio.run(both(engine))
    assert found == [alone(model, request)[0] for request in requests]


def test_a_reader_that_leaves_with_its_loop_disturbs_nobody(model):
    (request,) = requests_of({"max_new_tokens": 40, "eos_ids": ()})

    async def first_event(answer):
        events = aiter(answer)
        return await anext(events), events

    with engine_of(model, rows=1) as engine:
        left = engine.submit(request)
        # The iterator is kept, and its loop is closed.
        event, _events = asyncio.run(first_event(left))
        assert event.finish is None
        while not left.finished:
            time.sleep(0.01)
        assert engine.run([request])[0].ids == alone(model, request)[0]


def test_what_cannot_be_is_refused(model):
    with engine_of(model, context=32) as engine:
        for request, words in [
            (mx.Request([1] * 30, max_new_tokens=3), ["30 tokens", "context of 32"]),
            (mx.Request([]), ["empty"]),
            (mx.Request([VOCAB]), [str(VOCAB)]),
            (mx.Request([1], eos_ids=tuple(range(9))), ["9 end tokens"]),
            (mx.Request([1], logit_bias={VOCAB: 1.0}), ["biased token"]),
            (mx.Request([1], stop=[""]), ["stop string"]),
            (mx.Request([1], min_new_tokens=9, max_new_tokens=3), ["MinNewTokens"]),
        ]:
            with refused(*words):
                engine.submit(request)
    with refused("temperature"):
        mx.Request([1], temperature=-1.0)
    with refused("stride", "8"):
        mx.Engine(model, TOKENIZER, stride=9)
    with refused("context"):
        mx.Engine(model, TOKENIZER, context=10**6)


def test_a_model_that_is_damaged_ends_its_requests_with_a_sentence(model):
    broken = dataclasses.replace(
        model, norm=dataclasses.replace(model.norm, weight=model.norm.weight * np.float32(np.nan))
    )
    with engine_of(broken) as engine:
        (event,) = engine.run(requests_of({}))
    assert (event.finish, event.ids) == ("error", ())
    assert "not finite" in event.error


@pytest.mark.long
def test_rows_with_several_adapters_share_a_batch(model):
    models = {
        "one": adapted(model, rank=3, targets=("q_proj", "down_proj")),
        "two": adapted(model, rank=5, targets=("q_proj", "embedding")),
    }
    requests = [
        dataclasses.replace(request, adapter=name, prompt=[5] * 40)
        for name, request in zip(["one", "two", None, "one"], requests_of(*[{"eos_ids": ()}] * 4), strict=True)
    ]
    with engine_of(model, adapters=models) as engine:
        events = engine.run([*requests, *requests])
        with refused("'three'", "'one', 'two'"):
            engine.submit(dataclasses.replace(requests[0], adapter="three"))
    for request, event in zip([*requests, *requests], events, strict=True):
        assert event.ids == alone(models.get(request.adapter, model), request)[0], request.adapter
    assert len({event.ids for event in events}) == 3


@pytest.mark.long
def test_proposed_tokens_change_nothing(model):
    requests = requests_of(*MIXED[:2], *MIXED[5:7], MIXED[10], {"eos_ids": ()}, new=30)
    with engine_of(model, speculate=LOOKUP) as engine:
        answers = [engine.submit(request) for request in requests]
        events = [answer.result() for answer in answers]
        load = engine.load
    for request, event in zip(requests, events, strict=True):
        ids, _, out = alone(model, request)
        assert event.ids == ids, request
        if request.logprobs is not None:
            # Float32 sums in another order.
            np.testing.assert_allclose(
                [one.log_prob for one in event.log_probs], out.log_probs[0, : len(ids)], atol=1e-5
            )
    assert load.proposed > load.accepted > 0
    assert sum(answer.accepted for answer in answers) == load.accepted
    assert sum(answer.proposed for answer in answers) == load.proposed


def pausing(engine, *pattern):
    """Has an engine propose tokens, then not, and so on, for so many steps each."""
    turns = itertools.cycle([number % 2 == 0 for number, steps in enumerate(pattern) for _ in range(steps)])
    engine._balance.ready = lambda rows: next(turns)


def test_a_draft_that_is_the_model_is_always_right(model):
    """So its keys and values are the model's, after prompts and pauses."""
    requests = requests_of({"eos_ids": ()}, {}, {"eos_ids": (), **MIXED[1]}, lengths=(9, 13), new=30)
    with engine_of(model, rows=1, speculate=mx.Draft(model, tokens=3, cost=0.0)) as engine:
        pausing(engine, 2, 20, 3, 1)
        answers = [engine.submit(request) for request in requests]
        events = [answer.result() for answer in answers]
        load = engine.load
    for request, answer, event in zip(requests, answers, events, strict=True):
        assert event.ids == alone(model, request)[0], request
        # The end of an answer rejects what was proposed after it.
        assert answer.accepted >= answer.proposed - 3
    assert sum(answer.accepted for answer in answers) == load.accepted > 20


@pytest.mark.long
def test_a_draft_keeps_up_while_rows_come_and_go(model):
    """The ring turns and grows; beginnings of prompts are known; an answer is cancelled."""
    (start,) = random_prompts(70, seed=5)
    options = [{"eos_ids": ()}, {"eos_ids": (), **MIXED[1]}, {"eos_ids": ()}]
    requests = requests_of(*options * 4, lengths=(40, 5, 17), new=40)
    requests = [
        dataclasses.replace(request, prompt=[*start, *request.prompt]) if number % 3 else request
        for number, request in enumerate(requests)
    ]
    requests[-2] = dataclasses.replace(requests[-2], max_new_tokens=300)
    with engine_of(model, rows=2, context=512, speculate=mx.Draft(model, tokens=3, cost=0.0)) as engine:
        pausing(engine, 3, 2, 1, 70, 5, 17)
        first, *answers = [engine.submit(request) for request in requests]
        for number, _ in enumerate(first):
            if number == 3:
                answers[0].cancel()
        events = [answer.result() for answer in answers]
        assert engine.load.cached_tokens > 64
        assert engine.load.slots == 512
    assert [event.finish for event in events] == ["cancelled", *["length"] * 10]
    for answer in answers:
        assert answer.accepted >= answer.proposed - 3
    for request, event in zip(requests[3::3], events[2::3], strict=True):
        assert event.ids == alone(model, request)[0], request


@pytest.mark.long
def test_a_draft_of_another_shape_serves_adapters_and_grammars(model):
    class Odd:
        """A grammar, and a guide: odd tokens."""

        def guide(self):
            return self

        def allowed(self):
            return np.arange(VOCAB) % 2 == 1

        def push(self, id):
            pass

    adapters = {"one": adapted(model, rank=3, targets=("q_proj", "down_proj"))}
    requests = requests_of({"adapter": "one"}, {"grammar": Odd(), "eos_ids": ()}, lengths=(7,), new=30)
    draft = mx.Draft(talking_model(windows=(None,) * 3, kv_heads=1), tokens=3, cost=0.0)
    with engine_of(model, rows=1, adapters=adapters, speculate=draft) as engine:
        answers = [engine.submit(request) for request in requests]
        events = [answer.result() for answer in answers]
    for request, answer, event in zip(requests, answers, events, strict=True):
        assert (answer.proposed == 0) == (request.grammar is not None)
        if request.grammar is None:
            assert event.ids == alone(adapters.get(request.adapter, model), request)[0]
        else:
            assert all(id % 2 == 1 for id in event.ids)


@pytest.mark.slow
def test_nothing_is_compiled_for_a_draft_after_it_was_warmed(model):
    with engine_of(model, rows=1, speculate=mx.Draft(near_model(), tokens=3, cost=0.0)) as engine:
        engine.warm()
        pausing(engine, 2, 20)
        with count_compilations() as compiled:
            engine.run(requests_of(*MIXED[:-1], lengths=(9, 40)))
    assert not {"decode_rows", "enter", "resized", "read_chunk", "_take", "_put", "catch_up"} & {*compiled}


def test_drafts_that_cannot_be_are_refused(model):
    for draft, words in [
        (talking_model(vocab=60), ["60 tokens", "61"]),
        (mx.shard(model, make_mesh("dp=2"), Strategy("batch@dp")), ["other devices"]),
    ]:
        with refused(*words):
            mx.Engine(model, TOKENIZER, speculate=mx.Draft(draft))
    mesh, whole = make_mesh("tp=2"), talking_model(vocab=64)
    split = mx.shard(whole, mesh, Strategy("hidden@tp"))
    with refused("'vocab@tp'", "'hidden@tp'"):
        mx.Engine(split, TOKENIZER, speculate=mx.Draft(mx.shard(whole, mesh, Strategy("vocab@tp"))))
    split = mx.shard(whole, mesh, Strategy("kv_seq@tp"))
    with refused("'kv_seq'"):
        mx.Engine(split, TOKENIZER, speculate=mx.Draft(split))


@given(ids=st.lists(st.integers(0, 2), min_size=1, max_size=16), ngram=st.integers(1, 3))
@settings(deadline=None, max_examples=10, derandomize=True)
def test_a_history_proposes_what_a_lookup_does(ids, ngram):
    text, last = jnp.asarray([[*ids, *[9] * (20 - len(ids))]], jnp.int32), jnp.asarray([len(ids) - 1], jnp.int32)
    expected = look_up(text, last, 5, ngram)
    assert History(ids, ngram).propose(5) == np.asarray(expected)[0].tolist()


def test_proposals_that_do_not_pay_pause():
    balance, trials = Balance(mx.PromptLookup(tokens=4)), []
    balance.after_step(1, 0.02)
    for _ in range(4):
        passes = pauses = 0
        while balance.ready(1):
            balance.after_pass(1, 1.0, 0.03)
            passes += 1
        while not balance.ready(1):
            balance.after_step(1, 0.02)
            pauses += 1
        trials.append((passes, pauses))
    assert balance.cost(1) == pytest.approx(1.5)
    # Each bad trial makes the next pause longer.
    assert trials == [(3, 8), (1, 16), (1, 32), (1, 64)]
    balance.after_pass(1, 4.0, 0.03)
    assert balance.ready(1)


def test_a_draft_is_off_where_it_loses():
    balance = Balance(mx.Draft(talking_model(), tokens=4))
    for _ in range(3):
        assert not balance.ready(2)
        balance.after_step(2, 0.02)
    # Steps of two rows say nothing of steps of one.
    assert balance.ready(2)
    assert not balance.ready(1)
    passes = 0
    while balance.ready(2):
        balance.after_pass(2, 1.0, 0.03)
        passes += 1
    # It has a longer trial than a lookup, and then pauses for as long as one, or for longer.
    assert passes > 16
    pauses = []
    for _ in range(9):
        pauses.append(0)
        while not balance.ready(2):
            balance.after_step(2, 0.02)
            pauses[-1] += 1
        balance.after_pass(2, 1.0, 0.03)
    assert pauses == [8, 16, 32, 64, 128, 256, 512, 1024, 1024]
    assert Balance(mx.Draft(talking_model(), cost=0.0)).ready(1)


def test_sizes_of_the_ring():
    assert [ring_capacity(count) for count in (1, 128, 129, 300, 4096)] == [256, 256, 256, 512, 4096]


LAYOUTS = {
    "one": None,
    "heads, vocab": (mx.HEADS.layout, "tp=2"),
    "head_dim": (mx.HEAD_DIM.layout, "tp=2"),
    "kv_seq": (mx.HEADS_X_KV_SEQ.layout, "kv=2,rep=4"),
    "batch": (f"{mx.HEADS.layout} batch@dp", "dp=4,tp=2"),
    "batch, kv_seq": ("batch@dp kv_seq@kv vocab@kv", "dp=2,kv=4"),
}
# These share their ways of splitting rows, slots and the vocabulary with the others.
_MORE = ("heads, vocab", "kv_seq", "batch")


def _draft_like(model):
    """A draft that is split as the model is; a lookup where there cannot be one."""
    if model.strategy.axes("kv_seq"):
        return LOOKUP
    draft = near_model(vocab=64, kv_heads=4)
    return mx.Draft(draft if model.mesh is None else mx.shard(draft, model.mesh, model.strategy), tokens=3, cost=0.0)


@settings(
    deadline=None,
    max_examples=EXAMPLES,
    derandomize="ENGINE_EXAMPLES" not in os.environ,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.long if name in _MORE else ()) for name in LAYOUTS]
)
@pytest.mark.slow
def test_the_law(layout, data):
    model = whole = talking_model(vocab=64, kv_heads=4)
    if LAYOUTS[layout] is not None:
        text, axes = LAYOUTS[layout]
        model = mx.shard(whole, make_mesh(axes), Strategy(text))
    count = data.draw(st.integers(1, 12), "requests")
    options = [data.draw(st.sampled_from(MIXED), "options") for _ in range(count)]
    lengths = [data.draw(st.integers(1, 90), "length") for _ in range(count)]
    requests = requests_of(*options, lengths=lengths, new=data.draw(st.integers(6, 40), "new"))
    shared = data.draw(st.integers(0, 60), "shared")
    (start,) = random_prompts(shared, seed=5) if shared else ([],)
    requests = [
        dataclasses.replace(request, prompt=[*start, *request.prompt]) if number % 2 else request
        for number, request in enumerate(requests)
    ]
    cancelled = set(data.draw(st.lists(st.integers(0, count - 1), max_size=3), "cancelled"))
    pauses = [data.draw(st.sampled_from([0, 0, 0.01]), "pause") for _ in range(count)]
    rows = data.draw(st.sampled_from([4, 8]), "rows")
    chunk, stride = data.draw(st.sampled_from([16, 32, 64]), "chunk"), data.draw(st.integers(1, 8), "stride")
    limit = data.draw(st.sampled_from([0, 40_000, 2**28]), "prefix cache")
    speculate = data.draw(st.sampled_from([None, LOOKUP, _draft_like(model)]), "speculate")
    options = {"chunk": chunk, "stride": stride, "prefix_cache": limit, "speculate": speculate}
    with engine_of(model, rows=rows, **options) as engine:
        if speculate is not None:
            pausing(engine, *(data.draw(st.integers(1, 40), "turns") for _ in range(4)))
        answers = []
        for number, (request, pause) in enumerate(zip(requests, pauses, strict=True)):
            answers.append(engine.submit(request))
            time.sleep(pause)
            if number in cancelled:
                answers[-1].cancel()
        events = [answer.result() for answer in answers]
        load = engine.load
    assert load.active == load.waiting == 0
    for request, event in zip(requests, events, strict=True):
        ids, text, _ = alone(whole, request)
        if event.finish == "cancelled":
            ids = ids[: len(event.ids)]
        else:
            assert event.text == text
        assert event.ids == ids, request
