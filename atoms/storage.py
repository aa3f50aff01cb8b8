"""Files that are whole or absent: everything is written to a temporary name, synced, then renamed into place.

The only place that turns operating-system errors of writing (disk full, read-only) into `StorageError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from atoms.errors import StorageError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Re-raises OSError as StorageError with the path, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; nothing was left half-written. "
            "Free disk space or choose a writable path, then run the command again: finished stages are kept"
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces the file `path` by `data` atomically. Raises StorageError."""
    with replaced_file(path) as file:
        file.write(data)


@contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """Yields a new file that becomes `path` on success and vanishes on failure. Raises StorageError."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def write_json(path: Path, data: object) -> None:
    """Replaces `path` by indented JSON. Raises StorageError; ValueError for NaN and infinities."""
    write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Replaces `path` by a safetensors file of `tensors` (torch tensors; copied to the CPU, contiguous)."""
    from safetensors.torch import save

    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_bytes(path, save(plain, metadata=dict(metadata) if metadata else None))


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty temporary directory that becomes `path` on success and vanishes on failure.

    An existing `path` is kept and StorageError raised, unless `replace`.
    """
    if path.exists() and not replace:
        raise StorageError(f"{path} exists already; choose another path, or pass --force to replace it")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        with storage_errors(path):
            _sync_tree(temporary)
            os.chmod(temporary, 0o755)
            _swap_in(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_hash(data: object) -> str:
    """sha256 hex of the canonical JSON of `data` (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def recipe_file(folder: Path, kind: str, recipe: object) -> Path:
    """The safetensors file of `folder` that is named after what it is and, hashed, all that decides its content."""
    return folder / f"{kind}-{canonical_hash(recipe)[:16]}.safetensors"


def _swap_in(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`; an old `path` is moved aside first, put back on failure, and removed last."""
    aside = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    if path.exists():
        os.replace(path, aside)
    try:
        os.replace(temporary, path)
    except OSError:
        if aside.exists():
            os.replace(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    _sync_directory(path.parent)


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for name in files:
            with open(Path(directory) / name, "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(directory))


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
