"""The application: endpoints of OpenAI's API over an engine."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ..engine import Engine
from ..errors import InputError
from .answering import Job, respond
from .bodies import JsonResponse, described, error_response, read_body
from .chat import chat_job
from .completions import completion_job
from .conversation import encode_messages
from .errors import ApiError, of_input
from .events import unless_gone
from .gate import Gate
from .protocol import ChatRequest, CompletionRequest, TokenizeRequest
from .service import Service


_PAGE = Path(__file__).with_name("page.html")
# The page has its script and style in it, and whatever a model writes can fetch nothing.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    engine: Engine,
    *,
    name: str,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
    allow_origins: Sequence[str] = (),
    timeout: float = 600.0,
    max_body: int = 4 * 2**20,
    log_prompts: bool = False,
    trouble: Callable[[], str | None] = lambda: None,
) -> FastAPI:
    """An ASGI application with the endpoints of OpenAI's API, a page, and metrics.

    `app.state.service` has what [`mistral_eqx.server.run`][] needs to end it well.

    **Arguments:**

    - `engine`: what answers; whoever made it closes it.
    - `name`: the name of the model for clients, which choose it as `model`, or one of the engine's adapters.
    - `api_key`: the key that clients must send; `None` for none.
    - `hosts`: the names by which clients may call this server; `None` for any. Give the names of this machine if it is
        the only one that shall reach the server and there is no key, because of DNS rebinding.
    - `allow_origins`: the origins whose pages may use the server, such as `"https://example.org"`, or `"*"`.
    - `timeout`: the most seconds of a request, in the queue and decoding.
    - `max_body`: the most bytes of a request's body.
    - `log_prompts`: whether prompts are logged.
    - `trouble`: says why the server is about to end, if it is; `/health` asks.

    **Raises:** `InputError` if the key is empty, or if an adapter has the name of the model.
    """
    if name in engine.adapters:
        raise InputError(f"The model and an adapter have the name {name!r}; give another name.", key="name")
    if api_key is not None and not api_key.strip():
        raise InputError("The API key is empty; give a key, or leave it out.", key="api_key")
    service = Service(engine, name, timeout, log_prompts)
    # Its pages of documentation would fetch scripts from elsewhere.
    app = FastAPI(title="mistral-eqx", docs_url=None, redoc_url=None)
    app.state.service = service
    page = _PAGE.read_text(encoding="utf-8")

    async def answer(request: Request, job: Coroutine[Any, Any, Job]) -> Response:
        async def work() -> Response:
            return await respond(service, request, await job)

        return await unless_gone(request, work())

    @app.post("/v1/chat/completions", openapi_extra=described(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        asked = await read_body(request, ChatRequest, max_body)
        return await answer(request, asyncio.to_thread(chat_job, service, asked))

    @app.post("/v1/completions", openapi_extra=described(CompletionRequest))
    async def completions(request: Request) -> Response:
        asked = await read_body(request, CompletionRequest, max_body)
        return await answer(request, asyncio.to_thread(completion_job, service, asked))

    @app.post("/tokenize", openapi_extra=described(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        asked = await read_body(request, TokenizeRequest, max_body)
        ids = await asyncio.to_thread(_token_ids, service, asked)
        return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": engine.context})

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        message = "This server has no embeddings: its models are made to continue text; use a model for embeddings."
        return error_response(ApiError(400, message, code="unsupported_endpoint"))

    @app.get("/v1/models")
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": [_model(service, one) for one in service.names]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        service.adapter(model)
        return JsonResponse(_model(service, model))

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            return JsonResponse({"status": "draining"}, 503)
        if (reason := trouble()) is not None:
            return JsonResponse({"status": "failed", "reason": reason}, 503)
        try:
            load = engine.load
        except Exception as error:
            service.report(error)
            return JsonResponse({"status": "failed", "reason": str(error)}, 503)
        return JsonResponse({"status": "ok", "active": load.active, "waiting": load.waiting})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def conversation_page() -> Response:
        headers = {"Content-Security-Policy": _PAGE_POLICY, "Referrer-Policy": "no-referrer"}
        return HTMLResponse(page, headers=headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        message = {404: f"There is no {path} here.", 405: f"{path} has no method {request.method}."}
        said = message.get(error.status_code, str(error.detail))
        return error_response(ApiError(error.status_code, said, headers=error.headers))

    paths = [path for route in app.routes if "{" not in (path := getattr(route, "path", "{"))]
    app.add_middleware(Gate, service=service, api_key=api_key, hosts=hosts, paths=paths)
    if allow_origins:
        app.add_middleware(CORSMiddleware, allow_origins=allow_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _token_ids(service: Service, asked: TokenizeRequest) -> list[int]:
    service.adapter(asked.model)
    if asked.messages is not None:
        service.check_size(asked.messages, "messages")
        options = {"tools": asked.tools, "add_generation_prompt": asked.add_generation_prompt}
        return encode_messages(service.tokenizer, asked.messages, **options)
    service.check_size(asked.prompt, "prompt")
    try:
        return service.tokenizer.encode(asked.prompt or "", add_bos=None if asked.add_special_tokens else False)
    except InputError as error:
        raise of_input(error, "prompt") from None


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "mistral-eqx",
        "max_model_len": service.engine.context,
    }
