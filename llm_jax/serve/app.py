"""The application: endpoints, and the page as files of this package."""

import importlib.resources
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Response

from llm_jax.serve.chat_completions import ChatAnswer
from llm_jax.serve.completions import CompletionAnswer
from llm_jax.serve.errors import ApiError, handle_errors
from llm_jax.serve.guard import Guard, Receive, Send
from llm_jax.serve.measures import CONTENT_TYPE_LATEST, Measures
from llm_jax.serve.page_stream import NUM_ALTERNATIVES, generate
from llm_jax.serve.replies import FAILED
from llm_jax.serve.requests import (
    ChatRequest,
    CompletionRequest,
    LensRequest,
    PageRequest,
    TokensRequest,
)
from llm_jax.serve.service import Service

# Named here one by one: no request can name a file.
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("page", "api", "tokens", "card", "inside", "words")
    },
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_OPEN = frozenset({*_PAGE, "/health"})
_COUNTED = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat_completions",
    "/api/generate": "generate",
}


def make_app(service: Service) -> "Counted":
    """The service's ASGI application."""
    # No /docs: those pages come with scripts of another site.
    app = FastAPI(title="llm_jax", docs_url=None, redoc_url=None)
    handle_errors(app)
    _openai(app, service)
    _page(app, service)
    _operations(app, service)
    guarded = Guard(app, service.config, _OPEN)
    return Counted(guarded, service.worker.measures)


def _openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        return await CompletionAnswer(service, body).respond()

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest) -> Response:
        return await ChatAnswer(service, body).respond()

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        service.check_model(name)
        return _model(service)


def _model(service: Service) -> dict:
    about = service.about
    return {
        "id": about.name,
        "object": "model",
        "created": about.created,
        "owned_by": "llm_jax",
        "max_model_len": service.worker.max_length,
    }


def _page(app: FastAPI, service: Service) -> None:
    folder = importlib.resources.files("llm_jax.serve") / "page"
    for path, (name, kind) in _PAGE.items():
        app.get(path, include_in_schema=False)(_file((folder / name).read_bytes(), kind))

    @app.get("/api/about")
    async def about() -> dict:
        config, known = service.config, service.about
        return {
            "name": known.name,
            "step": known.step,
            "parameters": known.parameters,
            "vocabulary": service.vocabulary.size,
            "max_length": service.worker.max_length,
            "max_tokens": config.max_tokens or service.worker.max_length,
            "chats": service.chats is not None,
            "end": service.vocabulary.end,
            "looks_inside": not known.has_encoder,
        }

    @app.post("/api/generate")
    async def api_generate(body: PageRequest) -> Response:
        return await generate(service, body)

    @app.post("/api/score")
    async def score(body: TokensRequest) -> Response:
        return _json(await service.insight.scores(body.tokens, NUM_ALTERNATIVES))

    @app.post("/api/attention")
    async def attention(body: TokensRequest) -> Response:
        return _json(await service.insight.attention(body.tokens))

    @app.post("/api/lens")
    async def lens(body: LensRequest) -> Response:
        return _json(await service.insight.lens(body.tokens, body.target))


def _operations(app: FastAPI, service: Service) -> None:
    worker = service.worker

    @app.get("/health")
    async def health() -> dict:
        if worker.failure is not None:
            raise ApiError(503, worker.failure)
        return {
            "status": "ok",
            "running": worker.running,
            "waiting": worker.waiting,
            "open": worker.open_jobs,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.measures.page(), media_type=CONTENT_TYPE_LATEST)


def _file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, headers={"cache-control": "no-cache"}, media_type=kind)

    return send


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


class Counted:
    """An ASGI application that counts the requests of another by how they ended: "ok", or the error's status."""

    def __init__(self, app, measures: Measures):
        self._app, self._requests = app, measures.requests

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        endpoint = _COUNTED.get(scope["path"])
        if endpoint is None:
            return await self._app(scope, receive, send)
        status = None

        async def watched(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            status = scope.get(FAILED, status)
            if status is not None:
                self._requests.labels(endpoint, "ok" if status == 200 else str(status)).inc()
