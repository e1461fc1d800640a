"""/openapi.json and /docs. The page is written here, since FastAPI's own loads its program from another host."""

from __future__ import annotations

import html
import json
from functools import cache
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}
h2{margin-top:2rem}code,pre{font:14px/1.5 ui-monospace,monospace}summary{cursor:pointer;padding:.3rem 0}
table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #8884;padding:.25rem .5rem;text-align:left;
vertical-align:top}pre{overflow:auto;padding:.5rem;background:#8881}
"""
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


def add_documents(app: FastAPI) -> None:
    """Describe the errors as they are, and show all of it at /docs."""
    original = app.openapi

    @cache
    def openapi() -> dict[str, Any]:
        document = original()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # a request that does not validate is answered with 400
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_page(openapi()), headers=HEADERS)


def _page(document: dict[str, Any]) -> str:
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>llmkit API</title><style>{STYLE}</style>"]
    parts.append('<h1>llmkit API</h1><p>The machine-readable form is <a href="/openapi.json">/openapi.json</a>.')
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{_text(operation['summary'])}")
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                parts.append(_fields(schema, "Request"))
            for content in operation["responses"].get("200", {}).get("content", {}).values():
                if content.get("schema", {}).get("$ref"):
                    parts.append(_fields(content["schema"], "Answer"))
    parts.append("<h2>Types</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(
            f"<details id={html.escape(name)}><summary>{html.escape(name)}</summary>{_table(schema)}</details>"
        )
    return "\n".join(parts)


def _fields(schema: dict[str, Any], title: str) -> str:
    return f"<p>{title}: {_type(schema)}"


def _table(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = []
    for name, value in schema.get("properties", {}).items():
        need = "required" if name in required else ""
        text = _text(value.get("description", ""))
        rows.append(f"<tr><td><code>{html.escape(name)}</code><td>{_type(value)}<td>{need}<td>{text}")
    return f"<table>{''.join(rows)}</table>" if rows else f"<pre>{html.escape(json.dumps(schema, indent=1))}</pre>"


def _type(schema: dict[str, Any]) -> str:
    if reference := schema.get("$ref"):
        name = html.escape(reference.rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if alternatives := schema.get("anyOf"):
        return " or ".join(_type(each) for each in alternatives if each.get("type") != "null")
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if "enum" in schema or "const" in schema:
        return " or ".join(f"<code>{html.escape(str(v))}</code>" for v in schema.get("enum", [schema.get("const")]))
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return html.escape(" ".join([schema.get("type", "anything"), *bounds]))


def _text(text: str) -> str:
    return html.escape(text)
