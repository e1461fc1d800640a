"""The application: endpoints, middleware and pages of one server."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llmkit import __version__
from llmkit_http import chat, completions, errors
from llmkit_http.limits import BodyLimit
from llmkit_http.models import Model
from llmkit_http.schemas import ERRORS, Health, ModelCard, ModelList
from llmkit_http.service import Service, service

STATIC = Path(__file__).parent / "static"
# The page asks no other host for anything, and no other page may frame it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(responses=ERRORS)


def create_app(at: Service, keys: list[str]) -> FastAPI:
    """The application of one server."""
    app = FastAPI(title="llmkit", version=__version__, description="An OpenAI-compatible server.", redoc_url=None)
    app.state.service = at
    for part in (router, completions.router, chat.router):
        app.include_router(part)
    errors.install(app)
    app.router.default = _static_file
    app.add_middleware(BodyLimit, limit=at.options.max_body * 2**20)
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


async def _static_file(scope: Scope, receive: Receive, send: Send) -> None:
    """The chat page and its files, for paths that are no endpoint."""
    name = scope["path"].lstrip("/") or "index.html"
    path = STATIC / name
    found = scope["method"] in ("GET", "HEAD") and STATIC in path.resolve().parents and path.is_file()
    if not found:
        raise HTTPException(404)
    await FileResponse(path, headers=PAGE_HEADERS)(scope, receive, send)
