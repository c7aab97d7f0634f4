"""From requests to the engine to an HTTP answer, whole or as a stream."""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

from fastapi import Request as HttpRequest, Response

from ..documents import shown
from ..engine import Answer, Event, Request
from .bodies import JsonResponse
from .errors import NO_SECOND_TRY, ApiError, internal
from .events import DONE, EventStream, event as as_event
from .protocol import SamplingRequest
from .service import LOG, Service


# Seconds after which an answer counts as late that the engine should have ended.
_GRACE = 10


class Choice(Protocol):
    """Writes one of the choices of an answer.

    **Attributes:**

    - `enough`: whether the choice ended its answer itself.
    """

    enough: bool

    def begin(self) -> list[dict[str, Any]]:
        """What a stream has before the first token."""
        ...

    def add(self, event: Event) -> list[dict[str, Any]]:
        """What an event adds to a stream."""
        ...

    def whole(self) -> dict[str, Any]:
        """The choice, after all events."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """What an HTTP request asks of the engine.

    **Attributes:**

    - `asked`: its body.
    - `requests`: one for each choice; the `n` choices of a prompt follow each other.
    - `choice`: makes the writer of a choice from its index and its answer.
    - `param`: the parameter with the prompt.
    - `prefix`, `kind`, `chunk_kind`: of the id, and the kinds of the answer and of the parts of a stream.
    """

    asked: SamplingRequest
    requests: Sequence[Request]
    choice: Callable[[int, Answer], Choice]
    param: str
    prefix: str
    kind: str
    chunk_kind: str


async def respond(service: Service, http: HttpRequest, job: Job) -> Response:
    """Submits a job, and answers; a stream is returned before its first token.

    **Raises:** `ApiError`.
    """
    answers = await _submitted(service, job)
    going = _Going(service, http, job, answers)
    if job.asked.stream:
        return EventStream(going.stream(), going.end)
    try:
        return JsonResponse(await going.whole())
    finally:
        going.end()


async def _submitted(service: Service, job: Job) -> list[Answer]:
    """Submits the requests in a thread: the engine takes milliseconds to check one, in which others have tokens."""
    submitting = asyncio.create_task(asyncio.to_thread(service.submit, job.requests, job.param))
    try:
        return await asyncio.shield(submitting)
    except asyncio.CancelledError:  # the client went away meanwhile
        submitting.add_done_callback(_cancel)
        raise


def _cancel(submitting: asyncio.Task[list[Answer]]):
    if not submitting.cancelled() and submitting.exception() is None:
        for answer in submitting.result():
            answer.cancel()


class _Going:
    """A job while it is answered."""

    def __init__(self, service: Service, http: HttpRequest, job: Job, answers: list[Answer]):
        self._service, self._http, self._job, self._answers = service, http, job, answers
        self._choices = [job.choice(index, answer) for index, answer in enumerate(answers)]
        self._clock = service.metrics.clock()
        self._new = 0
        self._envelope = {
            "id": f"{job.prefix}-{secrets.token_hex(12)}",
            "object": job.chunk_kind if job.asked.stream else job.kind,
            "created": int(time.time()),
            "model": job.asked.model or service.name,
        }
        if service.log_prompts:
            for answer in answers[:: job.asked.n]:
                prompt = service.tokenizer.decode(answer.prompt, skip_special=False)
                LOG.info("The prompt of %s: %s", self._envelope["id"], shown(prompt, 10_000))

    def end(self):
        """Cancels the answers that are not finished, and says in the log how many tokens there were."""
        for answer in self._answers:
            answer.cancel()
        usage = self._usage()
        self._http.state.did = (
            f"{self._envelope['id']}: {usage['prompt_tokens']} tokens "
            f"({usage['prompt_tokens_details']['cached_tokens']} cached) and {self._new} new"
        )

    async def whole(self) -> dict[str, Any]:
        """The whole answer."""
        async with contextlib.aclosing(self._events()) as events:
            async for index, event in events:
                self._choices[index].add(event)
        return {**self._envelope, "choices": [choice.whole() for choice in self._choices], "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer as events."""
        options = self._job.asked.stream_options
        with_usage = options is not None and options.include_usage
        rest = {"usage": None} if with_usage else {}
        try:
            for choice in self._choices:
                for part in choice.begin():
                    yield as_event({**self._envelope, "choices": [part], **rest})
            async with contextlib.aclosing(self._events()) as events:
                async for index, event in events:
                    for part in self._choices[index].add(event):
                        yield as_event({**self._envelope, "choices": [part], **rest})
            if with_usage:
                yield as_event({**self._envelope, "choices": [], "usage": self._usage()})
            yield DONE
        except ApiError as error:
            yield as_event(error.body())
        except Exception as error:
            self._service.report(error)
            yield as_event(internal().body())

    async def _events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of all answers as they come, each with the index of its answer.

        **Raises:** `ApiError` if an answer does not end well.
        """
        late = asyncio.get_running_loop().call_later(self._service.timeout + _GRACE, self._give_up)
        try:
            async with contextlib.aclosing(_merged(self._answers)) as events:
                async for index, event in events:
                    if event.ids:
                        self._clock.tick(index)
                        self._new += len(event.ids)
                    if event.finish not in (None, "stop", "length") and not self._choices[index].enough:
                        raise self._failure(event)
                    yield index, event
        finally:
            late.cancel()

    def _give_up(self):
        for answer in self._answers:
            if not answer.finished:
                answer.put(Event(finish="timeout"))

    def _failure(self, event: Event) -> ApiError:
        if event.finish == "timeout":
            message = f"The answer took more than {self._service.timeout:g} s; ask for fewer tokens."
            return ApiError(504, message, kind="server_error", code="timeout", headers=NO_SECOND_TRY)
        if event.finish == "cancelled":
            return ApiError(503, "The server ends; try another one.", kind="server_error", code="shutting_down")
        return ApiError(500, event.error or "The engine has a fault.", kind="server_error", code="engine_error")

    def _usage(self) -> dict[str, Any]:
        firsts = self._answers[:: self._job.asked.n]
        prompt = sum(len(answer.prompt) for answer in firsts)
        accepted = sum(answer.accepted for answer in self._answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._new,
            "total_tokens": prompt + self._new,
            "prompt_tokens_details": {"cached_tokens": sum(answer.cached for answer in firsts)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(answer.proposed for answer in self._answers) - accepted,
            },
        }


async def _merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all answers as they come, each with the index of its answer."""
    if len(answers) == 1:
        async for event in answers[0]:
            yield 0, event
        return
    came: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def take(index: int, answer: Answer):
        async for event in answer:
            came.put_nowait((index, event))

    tasks = [asyncio.create_task(take(index, answer)) for index, answer in enumerate(answers)]
    try:
        going = len(tasks)
        while going:
            index, event = await came.get()
            going -= event.finish is not None
            yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
