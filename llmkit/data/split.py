"""Dividing long text into parts, so that memory stays bounded and one big file still has a validation split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmkit.tokenizer import END_OF_TEXT

#: Most characters in a part: a few thousand to twenty thousand tokens, many sequences long, so that cuts are rare.
PART = 1 << 16


def split_text(text: str) -> Iterator[str]:
    """The parts of a document, at most PART characters each, cut behind a newline, else behind white space.

    Joined they are the document; those of white space alone are left out.
    """
    start = 0
    while len(text) - start > PART:
        end = _cut(text, start)
        if not (part := text[start:end]).isspace():
            yield part
        start = end
    part = text[start:] if start else text
    if part and not part.isspace():
        yield part


def split_stream(pieces: Iterable[str]) -> Iterator[str]:
    """The parts of a text that comes in pieces. END_OF_TEXT, with the newlines around it, separates documents."""
    buffer = ""
    for piece in pieces:
        buffer += piece
        start = 0
        while len(buffer) - start > PART + len(END_OF_TEXT):  # so that a whole separator is seen, or none begins
            part, start = _next(buffer, start)
            if part:
                yield part
        buffer = buffer[start:]
    start = 0
    while start < len(buffer):
        part, start = _next(buffer, start)
        if part:
            yield part


def _next(text: str, start: int) -> tuple[str, int]:
    """The part at `start`, "" for white space alone, and where the next one begins."""
    separator = text.find(END_OF_TEXT, start, start + PART + len(END_OF_TEXT))
    if separator >= 0:
        part, end = text[start:separator].rstrip("\n"), separator + len(END_OF_TEXT)
        while end < len(text) and text[end] == "\n":
            end += 1
    else:
        end = len(text) if len(text) - start <= PART else _cut(text, start)
        part = text[start:end]
    return ("" if part.isspace() else part), end


def _cut(text: str, start: int) -> int:
    """Where to end a part of `text` that begins at `start`, the rest being longer than PART."""
    stop, earliest = start + PART, start + PART // 2
    newline = text.rfind("\n", earliest, stop)
    if newline >= 0:
        return newline + 1
    for index in range(stop - 1, earliest - 1, -1):
        if text[index].isspace():
            return index + 1
    return stop
