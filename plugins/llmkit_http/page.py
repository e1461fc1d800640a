"""The chat page: where its files are, and the headers that they are sent with."""

from __future__ import annotations

from pathlib import Path

STATIC = Path(__file__).parent / "static"
# The page asks no other host for anything, and no other page may frame it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
