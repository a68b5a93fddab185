"""The routes: models, conversations, plain texts, the page. No request opens a file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from .errors import ApiError, first_problem, invalid, overloaded
from .guard import Guard
from .jobs import Done, Event, Failed, Job, Piece
from .models import Choice, Served
from .replies import Reply, event
from .scheduler import Full, Scheduler
from .schema import ChatRequest, CompletionRequest
from .settings import ServeRecipe

_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def make_app(recipe: ServeRecipe, served: Served, scheduler: Scheduler) -> Guard:
    """The whole server as an ASGI application."""
    # No pages of documentation: theirs come from another machine.
    app = FastAPI(title="Small Doge", docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_page(app)
    created = int(time.time())
    card = {"id": recipe.served_name, "object": "model", "created": created, "owned_by": "small-doge"}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        active, waiting = scheduler.counts()
        return {"status": "ok", "active": active, "waiting": waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_name(recipe, name)
        return card

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        body.check_extras()
        _check_name(recipe, body.model)
        if served.renderer is None:
            raise invalid(f"this model cannot chat: {served.no_chat}", "messages", "no_chat_template")
        messages = [message.plain() for message in body.messages]
        ids = await run_in_threadpool(served.chat, messages)
        if ids is None:
            raise invalid("the chat template refuses these messages", "messages", "invalid_messages")
        return await _answer(recipe, served, scheduler, body, ids, request)

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        body.check_extras()
        _check_name(recipe, body.model)
        prompt = body.one()
        ids = await run_in_threadpool(served.encode, prompt) if isinstance(prompt, str) else prompt
        if any(i >= served.vocabulary for i in ids):
            raise invalid(f"`prompt` holds a token that is not below {served.vocabulary}", "prompt", "invalid_token")
        return await _answer(recipe, served, scheduler, body, ids, request)

    return Guard(app, recipe, recipe.key())


async def _answer(
    recipe: ServeRecipe,
    served: Served,
    scheduler: Scheduler,
    body: ChatRequest | CompletionRequest,
    ids: list[int],
    request: Request,
) -> Response:
    field = "messages" if isinstance(body, ChatRequest) else "prompt"
    if not ids:
        raise invalid(f"`{field}` has no tokens, expected some text", field, "empty_prompt")
    if len(ids) > recipe.max_prompt_tokens:
        found = f"`{field}` has {len(ids):,} tokens, expected {recipe.max_prompt_tokens:,} at most"
        raise invalid(found, field, "context_length_exceeded")
    name, most = body.most()
    if most is not None and most > recipe.max_new_tokens:
        raise invalid(f"`{name}` is {most}, expected {recipe.max_new_tokens} at most", name, "invalid_value")

    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def tell(what: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, what)

    limit = most or recipe.max_new_tokens
    job = Job(served, ids, _choice(recipe, body), limit, body.stops(), recipe.max_seconds, tell)
    told = body.stream_options
    usage = (bool(told and told.include_usage), bool(told and told.continuous_usage_stats))
    reply = Reply(recipe.served_name, isinstance(body, ChatRequest), len(ids), *usage)
    try:
        scheduler.submit(job)
    except Full:
        raise overloaded("as many requests wait as may, expected you to come again later") from None
    if body.stream:
        # The server gives up a client that does not read some time after the text is over.
        return _Events(_stream(events, reply), scheduler, job, recipe.max_seconds + 30)
    try:
        return await _whole(events, reply, request)
    finally:
        scheduler.cancel(job)


def _choice(recipe: ServeRecipe, body: ChatRequest | CompletionRequest) -> Choice:
    temperature = recipe.temperature if body.temperature is None else body.temperature
    top_p = recipe.top_p if body.top_p is None else body.top_p
    # The fewest tokens that make up nothing are the likeliest one; and float32 cannot divide by the smallest numbers.
    if top_p < 1e-6 or temperature < 1e-3:
        temperature, top_p = 0.0, 1.0
    seed = None if body.seed is None else body.seed & ((1 << 64) - 1)
    penalty = 1.0 if body.repetition_penalty is None else body.repetition_penalty
    return Choice(temperature, top_p, body.top_k or 0, penalty, seed)


async def _whole(events: asyncio.Queue[Event], reply: Reply, request: Request) -> Response:
    """The answer in one piece, unless the client leaves before."""
    left, texts = asyncio.ensure_future(request.receive()), []  # nothing comes but that it left
    try:
        while True:
            coming = asyncio.ensure_future(events.get())
            await asyncio.wait((left, coming), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return Response(status_code=499)
            what = coming.result()
            if isinstance(what, Piece):
                texts.append(what.text)
            elif isinstance(what, Done):
                return JSONResponse(
                    reply.whole("".join(texts), what.reason, what.completion_tokens, what.cached_tokens)
                )
            else:
                raise _failure(what)
    finally:
        left.cancel()


async def _stream(events: asyncio.Queue[Event], reply: Reply) -> AsyncIterator[str]:
    if begin := reply.begin():
        yield begin
    while True:
        what = await events.get()
        if isinstance(what, Piece):
            yield reply.piece(what.text, what.completion_tokens)
        elif isinstance(what, Done):
            yield reply.end(what.reason, what.completion_tokens, what.cached_tokens)
            return
        else:
            yield event(_failure(what).content())
            return


def _failure(what: Failed) -> ApiError:
    if what.why == "late":
        return overloaded("the request waited too long for its turn, expected you to come again later")
    if what.why == "closing":
        return overloaded("the server is ending")
    return ApiError(500, "the model failed on this request; the server's log says why", code="internal_error")


class _Events(StreamingResponse):
    """A stream whose job ends with it, however it ends, and even if it never began."""

    def __init__(self, content: AsyncIterator[str], scheduler: Scheduler, job: Job, seconds: float):
        super().__init__(content, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._scheduler, self._job, self._seconds = scheduler, job, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            with anyio.move_on_after(self._seconds):
                await super().__call__(scope, receive, send)
        finally:
            self._scheduler.cancel(self._job)


def _check_name(recipe: ServeRecipe, name: str) -> None:
    if name != recipe.served_name:
        raise ApiError(404, f"there is no such model, expected {recipe.served_name!r}", "model", "model_not_found")


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> Response:
        return JSONResponse(error.content(), status_code=error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> Response:
        return answer(first_problem(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        words = {404: "there is nothing at this path", 405: "this path does not take this method"}
        message = words.get(error.status_code, str(error.detail).lower())
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        headers = dict(error.headers) if error.headers else None
        return answer(ApiError(error.status_code, message, code=code, headers=headers))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(ApiError(500, "the server failed on this request; its log says why", code="internal_error"))


def _always(response: Response) -> Any:
    async def answer(request: Request) -> Response:
        return response

    return answer


def _add_page(app: FastAPI) -> None:
    """The chat page, read once."""
    for file in (resources.files(__package__) / "page").iterdir():
        ending = file.name.rpartition(".")[2]
        if ending in _TYPES:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            response = Response(file.read_bytes(), media_type=_TYPES[ending])
            app.add_route(path, _always(response))
