"""The application: endpoints, middleware and pages of one server."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit import __version__
from llmkit_http import chat, completions, errors, responses, tokens
from llmkit_http.documents import add_documents
from llmkit_http.limits import BodyLimit
from llmkit_http.metrics import Metrics
from llmkit_http.models import Model
from llmkit_http.page import PAGE_HEADERS, STATIC
from llmkit_http.schemas import ERRORS, Health, ModelCard, ModelList
from llmkit_http.security import ApiKeys, LocalHost
from llmkit_http.service import Service, service

router = APIRouter(responses=ERRORS)


def create_app(at: Service, keys: list[str]) -> FastAPI:
    """The application of one server."""
    app = FastAPI(title="llmkit", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = at
    for part in (router, completions.router, chat.router, responses.router, tokens.router):
        app.include_router(part)
    add_documents(app)
    errors.install(app)
    app.router.default = _static_file
    # The last one added comes first.
    app.add_middleware(BodyLimit, limit=at.options.max_body * 2**20)
    if keys:
        app.add_middleware(ApiKeys, keys=keys)
    else:
        app.add_middleware(LocalHost)
    if origins := at.options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], max_age=600
        )
    app.add_middleware(Counting, metrics=at.metrics)
    return app


@router.get("/v1/models", response_model=ModelList, tags=["OpenAI"], summary="The models, aliases too")
async def list_models(request: Request) -> ModelList:
    return ModelList(data=[_card(name, model) for name, model in service(request).models.named()])


@router.get("/v1/models/{model:path}", response_model=ModelCard, tags=["OpenAI"], summary="One model")
async def retrieve_model(model: str, request: Request) -> ModelCard:
    return _card(model, service(request).models.find(model))


def _card(name: str, model: Model) -> ModelCard:
    return ModelCard(
        id=name,
        created=model.created,
        max_model_len=model.engine.context_length,
        has_chat_template=model.checkpoint.chat_template is not None,
    )


@router.get("/health", response_model=Health, tags=["Operation"], summary="Ready?")
async def health(request: Request) -> Response:
    status = service(request).models.status
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


@router.get("/metrics", response_class=PlainTextResponse, tags=["Operation"], summary="For Prometheus")
async def metrics(request: Request) -> Response:
    return Response(service(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


class Counting:
    """ASGI middleware: counts requests by route and status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self.metrics.request(getattr(route, "path", "other"), message["status"])
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


async def _static_file(scope: Scope, receive: Receive, send: Send) -> None:
    """The chat page and its files, for paths that are no endpoint."""
    name = scope["path"].lstrip("/") or "index.html"
    path = STATIC / name
    found = scope["method"] in ("GET", "HEAD") and STATIC in path.resolve().parents and path.is_file()
    if not found:
        raise HTTPException(404)
    await FileResponse(path, headers=PAGE_HEADERS)(scope, receive, send)
