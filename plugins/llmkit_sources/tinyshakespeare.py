"""Tiny Shakespeare (Andrej Karpathy, char-rnn): one text of 1,115,394 bytes, downloaded into the cache folder."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator

from llmkit import files
from llmkit.data.readers import FileSource
from llmkit.data.source import Text

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def documents() -> Iterator[Text]:
    """The text in parts. Raises ValueError where it is neither in the cache folder nor can be downloaded."""
    path = files.cache_dir() / "tinyshakespeare.txt"
    if not path.is_file():
        try:
            with urllib.request.urlopen(URL, timeout=60) as response:
                content = response.read()
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise ValueError(
                f"tinyshakespeare cannot be downloaded from {URL} ({reason}): with no network, prepare `stdlib`, "
                f"or put the file at {path}"
            ) from None
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise ValueError(f"what {URL} sent is not tinyshakespeare: its checksum is wrong")
        files.write_text(path, content.decode("utf-8"))
    return FileSource([path]).documents()
