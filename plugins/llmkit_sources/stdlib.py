"""The running Python as a corpus: its documentation topics, then the modules of its standard library."""

from __future__ import annotations

import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

from llmkit.data.source import Text

#: Folders that are no part of the library proper, or that distributors strip: leaving them out everywhere gives every
#: machine with the same Python the same text. `encodings` is an eighth of the text and nearly all tables of numbers.
_LEFT_OUT = {
    "__pycache__",
    "config",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}
#: Generated per build or machine, a table of numbers, or already read as topics.
_GENERATED = ("_sysconfigdata", "_sysconfig_", "stringprep.py", "topics.py")


def documents() -> Iterator[Text]:
    """Topics in alphabetical order, then modules by path. Raises ValueError where Python came without its sources."""
    topics = _topics()
    modules = list(_modules())
    if not modules:
        raise ValueError(
            f"the source of Python's standard library is not at {sysconfig.get_path('stdlib')}: "
            "install Python with its .py files, or prepare other text"
        )
    total = sum(len(text) for text in topics) + sum(size for _, size, _ in modules)
    done = 0
    for text in topics:
        done += len(text)
        yield Text(text, done / total)
    for path, size, archive in modules:
        content = path.read_bytes() if archive is None else archive.read(str(path))
        done += size
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:  # the few modules that test or declare another encoding
            continue
        if text.strip():
            yield Text(text, done / total)


def _topics() -> list[str]:
    """The language reference as `help()` shows it; none where the distributor left it out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [text for _, text in sorted(topics.items())]


def _modules() -> Iterator[tuple[Path, int, zipfile.ZipFile | None]]:
    """(path, size in bytes, archive that holds it) of every module, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    if root.is_dir():
        for path in sorted(root.rglob("*.py")):
            if _wanted(path.relative_to(root)):
                yield path, path.stat().st_size, None
        if (root / "os.py").is_file():
            return
    name = f"python{sysconfig.get_config_var('py_version_nodot')}.zip"  # embedded distributions zip the library
    for place in (root.parent / name, root / name):
        if place.is_file():
            archive = zipfile.ZipFile(place)
            for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
                if entry.filename.endswith(".py") and _wanted(Path(entry.filename)):
                    yield Path(entry.filename), entry.file_size, archive


def _wanted(path: Path) -> bool:
    folders = {part.split("-", 1)[0] if part.startswith("config-") else part for part in path.parts[:-1]}
    return not folders & _LEFT_OUT and not path.name.startswith(_GENERATED)
