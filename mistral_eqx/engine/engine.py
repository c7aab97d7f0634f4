"""The engine: many requests in one batch, each with the tokens that it would get alone."""

import collections
import dataclasses
import itertools
import json
import os
import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Array, Int

from ..checks import CacheDType, Count, CountOrZero, checked
from ..config import MistralConfig
from ..errors import InputError
from ..generation import (
    AbstractProcessor,
    FrequencyPenalty,
    LogitBias,
    MinNewTokens,
    PresencePenalty,
    PromptLookup,
    RepetitionPenalty,
    Sampler,
)
from ..generation.caches import holds, parts, slots
from ..generation.finite import not_finite
from ..generation.flat import Flat
from ..generation.guided import Guide, allowed
from ..generation.prompt import checked_prompts
from ..generation.proposals import Draft, Speculate
from ..generation.reading import check_chunk, check_context, place_rows
from ..generation.request import Request as Call, placed
from ..lora import with_several
from ..nn import Cache, Mistral
from ..nn.block import check_whole
from ..parallel import broadcast, gather_to_host
from ..text import AbstractTokenizer, StopText
from .answer import Answer, Event, Finish, LogProb
from .choice import Numbers
from .drafting import catch_up, checked_proposer
from .pace import Pace
from .prefix_cache import PrefixCache
from .prompts import PromptReader, block_size
from .proposing import Balance, History
from .request import MOST_ENDS, Request
from .ring import aligned, empty_ring, ring_capacity, spare
from .rows import MOST_STEPS, Decoded, Rows, decode_rows, enter, resized


# A ring first has room for so many new tokens of a row; few, because attention reads all slots in each step.
_FIRST_ROOM = 128
# On CPUs a step is bound by arithmetic from here on, and products of quantized weights round in another way.
_MOST_ON_CPU = 15
# After so many steps in which half of the rows would do, the others are given up.
_PATIENCE = 16


class Full(RuntimeError):
    """The queue of an engine is full; try again later."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What an engine is doing, and what it has done.

    **Attributes:**

    - `active`: rows that decode.
    - `waiting`: requests that wait for a row, or whose prompt is prefilled.
    - `rows`: rows that a step computes.
    - `slots`: the size of the KV cache in tokens of each row.
    - `prompt_tokens`, `cached_tokens`, `new_tokens`: totals; `cached_tokens` are those of prompts that came out of the
        prefix cache.
    - `finished`: the number of answers that ended, by their `finish`.
    - `prefix_bytes`: the size of the prefix cache.
    - `proposed`, `accepted`: totals of proposed tokens, and of those among them that the model chose too.
    """

    active: int
    waiting: int
    rows: int
    slots: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    finished: Mapping[str, int]
    prefix_bytes: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclasses.dataclass(eq=False)
class _Job:
    """A request in the engine."""

    request: Request
    answer: Answer
    sampler: Sampler
    call: Call
    text: StopText
    guide: Guide | None
    deadline: float
    adapter: int
    history: History | None
    text_ids: list[int]  # the prompt and the new tokens
    number: int = 0
    count: int = 0  # new tokens
    base: int = 0  # the ring's slot, counted from the start, of the first token
    entered: int = 0  # that of the first new token

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt."""
        return self.answer.prompt


@dataclasses.dataclass(frozen=True)
class _Orders:
    """What the first process decides before each step.

    **Attributes:**

    - `came`: the numbers of new jobs, and their requests.
    - `ended`: the numbers of jobs that end, and why.
    - `closed`: whether the engine ends.
    - `chunk`: the size of the next chunk of a prompt.
    - `proposes`: whether tokens are proposed.
    """

    came: list[tuple[int, Request]]
    ended: list[tuple[int, Finish]]
    closed: bool
    chunk: int
    proposes: bool

    def written(self) -> str:
        """As text, for the other processes."""
        came = [
            (number, {**vars(request), "logit_bias": [*request.logit_bias.items()]}) for number, request in self.came
        ]
        return json.dumps([came, self.ended, self.closed, self.chunk, self.proposes])

    @classmethod
    def read(cls, text: str) -> "_Orders":
        """From the text of the first process."""
        came, *rest = json.loads(text)
        requests = [(number, Request(**{**of, "logit_bias": dict(of["logit_bias"])})) for number, of in came]
        return cls(requests, *rest)


class Engine:
    """Answers many requests at a time: a request enters a free row of the batch while others decode.

    ```python
    with mx.Engine(model, tokenizer) as engine:
        answer = engine.submit(mx.Request("The capital of France is", max_new_tokens=8))
        for event in answer:
            print(event.text, end="")
    ```

    Each request gets the tokens that [`mistral_eqx.generate`][] gives for it alone, whatever the other requests do.
    Prompts are prefilled in chunks between decoding steps. All rows are decoded by one compiled program, whatever the
    requests ask for. A thread of the engine does the work; it starts with the first request.

    **Arguments:**

    - `model`: the model, on one device or sharded by [`mistral_eqx.shard`][].
    - `tokenizer`: its tokenizer.
    - `rows`: how many requests are decoded together. A step computes 1, 2, 4, ... rows, as many as decode.
    - `context`: the most tokens of a prompt and its answer; by default the model's context, at most 4096. The KV cache
        grows up to it as needed, and shrinks again.
    - `chunk`: the most tokens of a prefill chunk. While rows decode, they wait for one chunk at a time, and the engine
        makes it so small that it takes at most two steps.
    - `stride`: how many tokens, at most 8, are decoded in one call while no request waits for a row; requests with a
        grammar are decoded one token at a time.
    - `queue`: the most requests that wait for a row.
    - `prefix_cache`: the most bytes of keys and values that are kept for later prompts with the same beginning; 0 keeps
        none.
    - `cache_dtype`: as in [`mistral_eqx.generate`][].
    - `adapters`: models that [`mistral_eqx.load_lora`][] or [`mistral_eqx.apply_lora`][] made of `model`, by the name
        with which requests choose them; rows with several of them share a batch.
    - `speculate`: a [`mistral_eqx.PromptLookup`][] or a [`mistral_eqx.Draft`][] proposes tokens, of which the model
        checks several in one pass. The tokens are the same.

    **Raises:** `ValueError` if an argument is outside its range, or `rows` cannot be split as the strategy splits
        `batch`; if a draft has another vocabulary, or is not split as the model is.
    """

    def __init__(
        self,
        model: Mistral,
        tokenizer: AbstractTokenizer,
        *,
        rows: int = 8,
        context: int | None = None,
        chunk: int = 256,
        stride: int = 1,
        queue: int = 256,
        prefix_cache: int = 2**28,
        cache_dtype: CacheDType | None = None,
        adapters: Mapping[str, Mistral] | None = None,
        speculate: Speculate | None = None,
    ):
        self._base = checked(model, Mistral, "model")
        check_whole(model)
        self.adapters = tuple(adapters or ())
        self.model = with_several(model, adapters) if adapters else model
        self.tokenizer = checked(tokenizer, AbstractTokenizer, "tokenizer")
        self.config: MistralConfig = model.config
        self.rows: int = checked(rows, Count, "rows")
        longest = min(self.config.max_positions, 4096) if context is None else checked(context, Count, "context")
        check_context(longest, 0, self.config.max_positions)
        self.context: int = longest
        self._shards = parts(model, "batch")
        self._platform = jax.default_backend() if model.mesh is None else model.mesh.devices.flat[0].platform
        if rows % self._shards:
            raise InputError(
                f"{rows} rows cannot be split over {self._shards} devices, over which the strategy "
                f"{model.strategy.layout!r} splits 'batch'; give a multiple of {self._shards}."
            )
        most = rows // self._shards
        # The numbers of rows on each device.
        self._counts = [min(2**power, most) for power in range((most - 1).bit_length() + 1)]
        self._pace = Pace(check_chunk(chunk, "chunk"))
        self._stride: int = checked(stride, Annotated[int, Ge(1), Le(MOST_STEPS)], "stride")
        self._queue = checked(queue, Count, "queue")
        self._cache_dtype: CacheDType | None = checked(cache_dtype, CacheDType | None, "cache_dtype")
        self._prefixes = PrefixCache(block_size(model), checked(prefix_cache, CountOrZero, "prefix_cache"))
        self._speculate = checked_proposer(speculate, model)
        self._draft = speculate.flat if isinstance(speculate, Draft) else None
        self._balance = None if speculate is None else Balance(speculate)
        self._flat = Flat(self.model)
        self._reading: tuple[_Job, PromptReader] | None = None
        self._came: list[_Job] = []
        self._job_numbers = itertools.count()
        self._waiting: collections.deque[_Job] = collections.deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(min(rows, os.cpu_count() or 1), "mistral-eqx guides")
        self._closing = False
        self._broken: str | None = None
        self._totals = collections.Counter[str]()
        self._finished = collections.Counter[str]()
        self._empty(1, slots(self.model, ring_capacity(1)))

    def submit(self, request: Request) -> Answer:
        """Puts a request into the queue, from any thread, and returns at once.

        **Returns:** an [`mistral_eqx.engine.Answer`][], an iterator over events.

        **Raises:** `InputError` if the request cannot be: `generate` says when; [`mistral_eqx.engine.Full`][] if the
            queue is full; `RuntimeError` if the engine is closed.
        """
        request = checked(request, Request, "request")
        if jax.process_index():
            raise InputError("Only the first process takes requests; call follow() in the others.")
        if request.seed is None:
            request = dataclasses.replace(request, seed=secrets.randbits(32))
        if request.grammar is not None and jax.process_count() > 1:
            raise InputError("An engine of several processes takes no grammar; start it in one process.", key="grammar")
        job = self._job(request)
        with self._changed:
            if self._closing:
                raise RuntimeError(self._broken or "The engine is closed.")
            if len(self._waiting) + len(self._came) >= self._queue:
                raise Full(f"{self._queue} requests are waiting; try again later.")
            job.number = next(self._job_numbers)
            self._came.append(job)
            self._totals["prompt"] += len(job.ids)
            self._started()
            self._changed.notify_all()
        return job.answer

    def run(self, requests: Iterable[Request]) -> list[Event]:
        """Answers all requests, and returns one event for each, in order."""
        answers: list[Answer] = []
        events: list[Event] = []
        for request in requests:
            # No more wait than the queue has room for.
            while len(answers) - len(events) >= self._queue:
                events.append(answers[len(events)].result())
            answers.append(self.submit(request))
        return events + [answer.result() for answer in answers[len(events) :]]

    @property
    def load(self) -> Load:
        """What the engine is doing, and what it has done.

        **Raises:** `RuntimeError` if the engine has failed.
        """
        with self._changed:
            if self._broken is not None:
                raise RuntimeError(self._broken)
            active = sum(job is not None for job in self._jobs)
            waiting = len(self._came) + len(self._waiting) + (self._reading is not None)
            return Load(
                active,
                waiting,
                len(self._jobs),
                self._slots,
                self._totals["prompt"],
                self._totals["cached"],
                self._totals["new"],
                dict(self._finished),
                self._prefixes.bytes,
                self._totals["proposed"],
                self._totals["accepted"],
            )

    def close(self, *, drain: bool = False, timeout: float | None = None):
        """Ends the engine; later requests are refused.

        **Arguments:**

        - `drain`: whether to answer all requests that came; otherwise they end as if they were cancelled.
        - `timeout`: after how many seconds they are cancelled all the same.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            # The other processes wait for what this one decides.
            thread = self._started() if jax.process_count() > 1 else self._thread
        if thread is None:
            return
        if drain:
            thread.join(timeout)
        for job in [*self._all(), *self._came]:
            job.answer.cancel()
        thread.join()

    def warm(self, tokens: int = 256):
        """Compiles what requests of at most so many tokens, their answers included, will need, whatever their number.

        Otherwise the first of them wait for the compiler. Call it before the first request, and in all processes.

        **Raises:** `RuntimeError` if there was a request.
        """
        if self._thread is not None:
            raise RuntimeError("The engine has had requests; warm it before the first.")
        sizes = [ring_capacity(1)]
        while sizes[-1] < min(tokens, self.context):
            sizes.append(2 * sizes[-1])
        state = Rows.init(self._shards, self.config.vocab, Numbers.init(self._shards, Sampler()))
        for size in reversed(sizes):
            kv_seq, ids, known = slots(self.model, size), (0,) * size, PrefixCache(self._prefixes.block, 2**62)
            reader = PromptReader(self._flat, ids, known, self._cache_dtype, draft=self._draft)
            for power in range(4, min(size, self._pace.most).bit_length()):
                reader = PromptReader(self._flat, ids, known, self._cache_dtype, draft=self._draft)
                reader.read(2**power)
            if self._prefixes.limit:
                known.add(self.model, ids[: known.block], reader.cache)
                PromptReader(self._flat, ids, known, self._cache_dtype, draft=self._draft)
            for count in self._counts:
                self._empty(count, kv_seq)
                self._put(state, reader.cache, 1, 0)
                for proposed in {0, self._proposed}:
                    if proposed and self._draft is not None:
                        self._catch_up(self._draft, 0)
                    self._step(self._by_row(), np.full((len(self._jobs), proposed), -1, np.int32), 1)
            for count in [*reversed(self._counts[:-1]), *self._counts[1:]]:
                self._resize(count, kv_seq)
            self._empty(1, kv_seq)

    def follow(self):
        """In every process but the first: does what the engine of the first process does, until that one is closed."""
        self._work()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object):
        self.close()

    def _job(self, request: Request) -> _Job:
        """The request, checked."""
        prompt: Any = request.prompt
        ((*ids,),) = checked_prompts([prompt], self.config.vocab, self.tokenizer)
        room = self.context - len(ids)
        adapter = -1
        if request.adapter is not None:
            if request.adapter not in self.adapters:
                known = ", ".join(map(repr, self.adapters)) or "none"
                raise InputError(f"There is no adapter {request.adapter!r}; the engine has {known}.", key="adapter")
            adapter = self.adapters.index(request.adapter)
        new = max(room, 1) if request.max_new_tokens is None else request.max_new_tokens
        check_context(len(ids), new, self.context)
        # Those of `generate`, which checks them, in the order of `Numbers.process`.
        processors: list[AbstractProcessor] = []
        if request.repetition_penalty != 1:
            processors.append(RepetitionPenalty(request.repetition_penalty))
        if request.presence_penalty:
            processors.append(PresencePenalty(request.presence_penalty))
        if request.frequency_penalty:
            processors.append(FrequencyPenalty(request.frequency_penalty))
        if request.logit_bias:
            processors.append(LogitBias(request.logit_bias))
        if request.min_new_tokens:
            processors.append(MinNewTokens(request.min_new_tokens))
        sampler = Sampler(
            request.temperature,
            request.top_k,
            request.top_p,
            request.min_p,
            request.typical_p,
            processors,
        )
        call = Call.init(
            self._base,
            [ids],
            new,
            sampler,
            request.eos_ids,
            jr.fold_in(jr.key(request.seed or 0), request.sample),
        )
        if len(call.ends) > MOST_ENDS:
            raise InputError(f"There are {len(call.ends)} end tokens; an engine takes at most {MOST_ENDS}.")
        guide = None if request.grammar is None else request.grammar.guide()
        if guide is not None:
            # A grammar for another vocabulary is refused now.
            allowed(guide, self.config.vocab)
        return _Job(
            request,
            Answer(tuple(ids)),
            sampler,
            call,
            StopText(self.tokenizer, request.stop, skip_special=request.skip_special, after=ids),
            guide,
            np.inf if request.timeout is None else time.monotonic() + request.timeout,
            adapter,
            History(ids, self._speculate.ngram) if isinstance(self._speculate, PromptLookup) else None,
            [*ids],
        )

    def _started(self) -> threading.Thread:
        """The engine's thread, which starts with the first call."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mistral-eqx engine", daemon=True)
            self._thread.start()
        return self._thread

    # What follows runs in the engine's thread. With several processes each has the same jobs, and does the same.

    def _work(self):
        try:
            with self._pool:
                while self._obey(orders := self._orders()):
                    self._read(orders.chunk)
                    self._decode(orders.proposes)
        except Exception as error:
            self._broken = f"The engine has failed: {type(error).__name__}: {error}"
            with self._changed:
                self._closing = True
            for job in [*self._all(), *self._came]:
                self._end(job, "error", error=self._broken)
            raise

    def _orders(self) -> _Orders:
        """What the first process has decided: waits until there is work, then looks what came and what is to end."""
        if jax.process_index():
            return _Orders.read(broadcast(None))
        with self._changed:
            while not (work := self._came or self._waiting or self._reading or any(self._jobs)) and not self._closing:
                self._changed.wait()
            came = [*self._came]
        chunk = self._pace.size if any(self._jobs) else self._pace.most
        proposes = self._balance is not None and self._balance.ready(len(self._jobs))
        orders = _Orders([(job.number, job.request) for job in came], self._unwanted(), not work, chunk, proposes)
        if jax.process_count() > 1:
            broadcast(orders.written())
        return orders

    def _unwanted(self) -> list[tuple[int, Finish]]:
        now = time.monotonic()
        return [
            (job.number, "cancelled" if job.answer.cancelled else "timeout")
            for job in self._all()
            if job.answer.cancelled or now >= job.deadline
        ]

    def _obey(self, orders: _Orders) -> bool:
        """Takes in what came and ends what is to end; false if the engine is to end."""
        with self._changed:
            for number, request in orders.came:
                job = self._came.pop(0) if self._came else self._job(request)
                job.number = number
                self._waiting.append(job)
        ended = dict(orders.ended)
        for job in self._all():
            if job.number in ended:
                self._end(job, ended[job.number])
        return not orders.closed

    def _all(self) -> list[_Job]:
        with self._changed:
            reading = [] if self._reading is None else [self._reading[0]]
            return [*(job for job in self._jobs if job is not None), *reading, *self._waiting]

    def _end(self, job: _Job, finish: Finish, event: Event | None = None, *, error: str | None = None):
        """Sends the last event, and takes the job out of the engine."""
        with self._changed:
            self._jobs = [None if one is job else one for one in self._jobs]
            if self._reading is not None and self._reading[0] is job:
                self._reading = None
            if job in self._waiting:
                self._waiting.remove(job)
            self._finished[finish] += 1
        event = Event() if event is None else event
        text = event.text + job.text.flush()
        job.answer.put(dataclasses.replace(event, text=text, finish=finish, stopped=job.text.stopped, error=error))

    def _read(self, chunk: int):
        """Reads at most `chunk` tokens of one prompt, and puts it into a row if these were the last."""
        if self._reading is None:
            with self._changed:
                if not self._waiting or sum(job is not None for job in self._jobs) == self.rows:
                    return
                job = self._waiting.popleft()
                # The last token is decoded with the other rows.
                reader = PromptReader(
                    self._flat, job.ids[:-1], self._prefixes, self._cache_dtype, job.adapter, self._draft
                )
                self._reading = job, reader
            job.answer.cached = reader.known
            self._totals["cached"] += reader.known
        job, reader = self._reading
        if not reader.done:
            start = time.perf_counter()
            width = reader.read(chunk)
            if any(self._jobs):
                jax.block_until_ready(reader.cache.positions)
                self._pace.chunk(width, time.perf_counter() - start)
        if reader.done:
            self._prefixes.add(self.model, reader.ids, reader.cache, job.adapter)
            self._enter(job, reader)

    def _enter(self, job: _Job, reader: PromptReader):
        length = len(reader.ids)
        least = max(holds(self.model, reader.cache.kv_seq), length + min(job.call.max_new_tokens, _FIRST_ROOM))
        kv_seq = slots(self.model, ring_capacity(least + spare(self.model)))
        if any(self._jobs):
            self._fit(entering=least)
        elif (1, kv_seq) != (self._count, self._slots):
            self._empty(1, kv_seq)
        self._written = aligned(self.model, self._written)
        job.base, job.entered = self._written - aligned(self.model, length), self._written
        state = Rows.init(
            self._shards,
            self.config.vocab,
            self._numbers_of(job),
            text=job.ids,
            limit=job.call.max_new_tokens,
            ends=tuple(job.call.ends.tolist()),
            key=jr.wrap_key_data(gather_to_host(jr.key_data(job.call.keys))[0]),
            biases=job.request.logit_bias,
            reports=job.request.logprobs is not None,
            adapter=job.adapter,
        )
        busy = self._busy()
        row = self._jobs.index(None, busy.index(min(busy)) * self._count)
        self._put(state, reader.cache, length, row)
        with self._changed:
            self._jobs[row], self._reading = job, None

    def _put(self, state: Rows, prompt: Cache, length: int, row: int):
        state, numbers = placed(self.model, state), (np.asarray(length, np.int32), np.asarray(row, np.int32))
        self._carried = enter((self.model.mesh, self.model.strategy, state, prompt, *numbers), self._carried)

    def _numbers_of(self, job: _Job) -> Numbers:
        request = job.request
        return Numbers.init(
            self._shards,
            job.sampler,
            repetition=request.repetition_penalty,
            presence=request.presence_penalty,
            frequency=request.frequency_penalty,
            least=request.min_new_tokens,
        )

    @property
    def _count(self) -> int:
        """The number of rows on each device."""
        return len(self._jobs) // self._shards

    def _busy(self) -> list[int]:
        """How many rows decode, on each device."""
        return [
            sum(job is not None for job in self._jobs[shard * self._count : (shard + 1) * self._count])
            for shard in range(self._shards)
        ]

    def _empty(self, count: int, kv_seq: int):
        """Makes `count` empty rows on each device and an empty ring."""
        rows = count * self._shards
        state = placed(self.model, Rows.init(rows, self.config.vocab, Numbers.init(rows, Sampler())))
        cache = empty_ring(self.model, self._draft, rows, kv_seq, self._cache_dtype)
        # Copies, because two arrays in one buffer could not both be donated.
        self._hold(Flat((jax.tree.map(jnp.copy, state), cache)), [None] * rows, kv_seq)
        self._written = 0  # slots of the ring, counted from the start
        self._drafted = 0  # those that a draft has read

    def _hold(self, carried: Flat, jobs: list[_Job | None], kv_seq: int):
        self._carried, self._patience = carried, _PATIENCE
        # What was last sent to the devices for each row, and whom it wants.
        self._given: tuple[list[bool] | None, tuple[Array, ...]] | None = None
        with self._changed:
            self._jobs, self._slots = jobs, kv_seq

    def _fit(self, *, entering: int | None = None, steps: int = 0):
        """Gives room to all rows that decode, for `steps` more tokens, and to another one with `entering` tokens."""
        busy = self._busy()
        if entering is not None:
            busy[busy.index(min(busy))] += 1
        extents = [self._written - job.base for job in self._jobs if job is not None]
        need = max([entering or 0, *(extent + steps for extent in extents)]) + spare(self.model)
        room, kv_seq = holds(self.model, self._slots), self._slots
        roomy = ring_capacity(need + _FIRST_ROOM)
        if not need <= room < 4 * roomy:
            kv_seq = slots(self.model, ring_capacity(need) if need > room else roomy)
        fewer = max((count for count in self._counts if count < self._count), default=0)
        self._patience = self._patience - 1 if max(busy) <= fewer else _PATIENCE
        count = fewer if self._patience < 0 else max(self._count, next(x for x in self._counts if x >= max(busy)))
        if (count, kv_seq) != (self._count, self._slots):
            self._resize(count, kv_seq)

    def _resize(self, count: int, kv_seq: int):
        """Copies what is on the devices to other numbers of rows and slots; each device moves its own rows."""
        order: list[int] = []
        jobs: list[_Job | None] = []
        for shard in range(self._shards):
            start = shard * self._count
            busy = [row for row in range(self._count) if self._jobs[start + row] is not None]
            order += [*busy, *[-1] * (count - len(busy))]
            jobs += [*(self._jobs[start + row] for row in busy), *[None] * (count - len(busy))]
        placed_order = place_rows(self.model, np.asarray(order, np.int32))
        carried = resized(self.model.mesh, self.model.strategy, placed_order, self._carried, kv_seq)
        self._hold(carried, jobs, kv_seq)
        self._written = aligned(self.model, self._written)

    @property
    def _proposed(self) -> int:
        """How many tokens are proposed to each row, if any."""
        if self._speculate is None:
            return 0
        most = _MOST_ON_CPU // len(self._jobs) - 1 if self._platform == "cpu" else self._speculate.tokens
        return max(0, min(self._speculate.tokens, most))

    def _proposals(self) -> Int[np.ndarray, "rows proposed"]:
        """The proposed tokens of each row, -1 for none; without columns if there are none at all.

        A draft will replace those of the rows that have some.
        """
        count = self._proposed
        found = np.full((len(self._jobs), count), -1, np.int32)
        for row, job in enumerate(self._jobs):
            if job is not None and count:
                # A pass, and what it skips at the end of the ring. Rows that get fewer tokens than others leave slots
                # empty; the rest of an answer must fit all the same.
                extent = self._written - job.base + 2 * (count + 1) + spare(self.model)
                left = job.call.max_new_tokens - job.count
                if extent > holds(self.model, self._slots) or extent + left > ring_capacity(self.context):
                    return found[:, :0]
                if job.guide is None:
                    found[row] = 0 if job.history is None else job.history.propose(count)
        return found if (found >= 0).any() else found[:, :0]

    def _decode(self, proposes: bool):
        """Decodes one token of each row, or some if nobody waits, and sends them."""
        if not any(self._jobs):
            return
        guided = any(job is not None and job.guide is not None for job in self._jobs)
        one = guided or self._reading or self._waiting or self._speculate
        steps = 1 if one else self._stride
        self._fit(steps=steps)
        by_row, proposals = self._by_row(), self._proposals()
        proposals = proposals if proposes else proposals[:, :0]
        jobs = [*self._jobs]
        if self._draft is not None and proposals.shape[1] and (behind := self._behind()):
            self._catch_up(self._draft, behind)
        start = time.perf_counter()
        decoded = self._step(by_row, proposals, steps)
        tokens, lost = gather_to_host(decoded.tokens), gather_to_host(decoded.lost)
        seconds = time.perf_counter() - start
        self._written += int(decoded.slots)
        if proposals.shape[1]:
            self._drafted, proposals = self._written, gather_to_host(decoded.proposals)
        self._account(proposals, tokens, seconds)
        log_probs = decoded.log_probs
        reports = any(job is not None and job.request.logprobs is not None for job in jobs)
        arrays = (log_probs.chosen, log_probs.tokens, log_probs.top) if reports else ()
        reported = [gather_to_host(x) for x in arrays]
        for row, job in enumerate(jobs):
            if job is not None:
                self._send(job, tokens[row].tolist(), int(lost[row]), [x[row].tolist() for x in reported])

    def _account(self, proposals: np.ndarray, tokens: np.ndarray, seconds: float):
        """Notes the time of a call, and what came of proposals."""
        rows, new = len(tokens), tokens >= 0
        if not proposals.shape[1]:
            self._pace.step(seconds / max(int(new.any(axis=0).sum()), 1))
            if self._balance is not None:
                self._balance.after_step(rows, seconds)
            return
        accepted = ((tokens[:, : proposals.shape[1]] == proposals) & (proposals >= 0)).sum(axis=1)
        proposed = (proposals >= 0).sum(axis=1)
        for row, job in enumerate(self._jobs):
            if job is not None:
                job.answer.proposed += int(proposed[row])
                job.answer.accepted += int(accepted[row])
        with self._changed:
            self._totals["proposed"] += int(proposed.sum())
            self._totals["accepted"] += int(accepted.sum())
        if self._balance is not None:
            self._balance.after_pass(rows, float(new.sum() / max(new.any(axis=1).sum(), 1)), seconds)

    def _step(self, by_row: tuple[Array, ...], proposals: Int[np.ndarray, "rows proposed"], passes: int) -> Decoded:
        given = *by_row, place_rows(self.model, proposals)
        draft = self._draft if proposals.shape[1] else None
        self._carried, decoded = decode_rows((self._flat, draft, given, np.asarray(passes, np.int32)), self._carried)
        return decoded

    def _behind(self) -> int:
        """How many of the last slots have tokens of rows that can have proposals, which the draft has not read."""
        entered = (job.entered for job in self._jobs if job is not None and job.guide is None)
        first = min(entered, default=self._written)
        return self._written - max(first, self._drafted)

    def _catch_up(self, draft: Flat, count: int):
        """Has the draft read the last `count` slots."""
        texts = np.zeros((len(self._jobs), self._slots), np.int32)
        for row, job in enumerate(self._jobs):
            if job is not None:
                texts[row, : len(job.text_ids)] = job.text_ids
        kept = draft, place_rows(self.model, texts), np.asarray(count, np.int32)
        self._carried = catch_up(kept, self._carried)
        # The time of a pass is measured without this.
        jax.block_until_ready(self._carried)

    def _by_row(self) -> tuple[Array, ...]:
        """Which rows decode, which tokens guides allow, one bit each, and which rows have a guide.

        A guide that fails ends its answer. Arrays that say the same as at the step before are not sent again.
        """
        words = np.zeros((len(self._jobs), -(-self.config.vocab // 32) * 4), np.uint8)
        guided = np.zeros(len(self._jobs), bool)
        jobs = [(row, job) for row, job in enumerate(self._jobs) if job is not None and job.guide is not None]
        # llguidance computes several masks at a time.
        masks = (self._pool.map if len(jobs) > 1 else map)(lambda item: _bits(item[1].guide, self.config.vocab), jobs)
        for (row, job), bits in zip(jobs, masks, strict=True):
            if isinstance(bits, InputError):
                self._end(job, "error", error=str(bits))
            else:
                words[row, : len(bits)], guided[row] = bits, True
        wanted = [job is not None for job in self._jobs]
        if self._given is None or guided.any() or self._given[0] != wanted:
            arrays = np.asarray(wanted), words.view("<u4"), guided
            self._given = None if guided.any() else wanted, tuple(place_rows(self.model, x) for x in arrays)
        return self._given[1]

    def _send(self, job: _Job, tokens: list[int], lost: int, reported: list[list[Any]]):
        """Sends the new tokens of a row, up to the one that ends it.

        **Arguments:**

        - `reported`: for each token its log-probability, the likeliest tokens, and their log-probabilities.
        """
        ids, text, finish, error = [], "", None, None
        if lost:
            tokens = tokens[: tokens.index(-1) if -1 in tokens else len(tokens)][:-1]
        for id in tokens:
            if id < 0 or finish is not None:
                break
            ids.append(id)
            job.count += 1
            job.text_ids.append(id)
            if job.history is not None:
                job.history.push(id)
            text += job.text.push(id)
            if job.text.stopped is not None or id in job.call.ends:
                finish = "stop"
            elif job.count == job.call.max_new_tokens:
                finish = "length"
            elif job.guide is not None:
                try:
                    job.guide.push(id)
                except InputError as refused:
                    finish, error = "error", str(refused)
        if lost and finish is None:
            finish, where = "error", f"new token {job.count + 1}"
            forbidden = "The processors forbid every token; let them allow at least one, such as an end token."
            error = str(not_finite(where, processors=True)) if lost > 0 else forbidden
        with self._changed:
            self._totals["new"] += len(ids)
        count = job.request.logprobs
        log_probs = [] if count is None else zip(ids, *reported, strict=False)
        found = tuple(LogProb(id, one, tuple(zip(of, by, strict=True))[:count]) for id, one, of, by in log_probs)
        event = Event(tuple(ids), text, found)
        if finish is None:
            job.answer.put(event)
        else:
            self._end(job, finish, event, error=error)


def _bits(guide: Guide, vocab: int) -> np.ndarray | InputError:
    """Which tokens a guide allows, one bit each, or why it cannot say."""
    try:
        return np.packbits(allowed(guide, vocab), bitorder="little")
    except InputError as error:
        return error
