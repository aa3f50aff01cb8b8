"""Files that are whole or absent: everything is written to a temporary name, synced, then renamed into place.

The only place that turns operating-system errors of writing (disk full, read-only) into `StorageError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
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
    """Yields a new file that becomes `path` on success and vanishes on failure. Raises StorageError.

    It has the mode of the file that it replaces, else what the umask leaves. A link at `path` stays one, and what it points
    to is replaced.
    """
    with storage_errors(path):
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _hidden_name(target)
        try:
            with open(temporary, "xb", opener=_opener(_mode_of(target))) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)


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

    An existing `path` is kept and StorageError raised, unless `replace`; its mode is kept then, but that its owner may write.
    """
    if path.exists() and not replace:
        raise StorageError(f"{path} exists already; choose another path, or pass --force to replace it")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _hidden_name(path)
        temporary.mkdir()
        if (mode := _mode_of(path)) is not None:
            temporary.chmod(mode | stat.S_IRWXU)
    try:
        yield temporary
        with storage_errors(path):
            _sync_tree(temporary)
            _swap_in(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_to_replace(path: Path, mark: str) -> None:
    """Raises StorageError if something lies at `path` that is no directory with the file `mark`, nor an empty one: it is
    something else than what is to be written, and would be lost."""
    if path.exists() and not (path.is_dir() and ((path / mark).is_file() or not any(path.iterdir()))):
        raise StorageError(
            f"{path} holds no {mark}, so it is not an earlier result, which is all that --force replaces; choose another path, "
            "or remove it yourself"
        )


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_hash(data: object) -> str:
    """sha256 hex of the canonical JSON of `data` (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def recipe_file(folder: Path, kind: str, recipe: object) -> Path:
    """The safetensors file of `folder` that is named after what it is and, hashed, all that decides its content."""
    return folder / f"{kind}-{canonical_hash(recipe)[:16]}.safetensors"


def _hidden_name(path: Path) -> Path:
    """A name beside `path` that nothing has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _mode_of(path: Path) -> int | None:
    """Who may do what with what lies at `path`; None where nothing does."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None


def _opener(mode: int | None) -> Callable[[str, int], int]:
    """Opens new files with `mode`, from the first byte on; None: with what the umask leaves, which only the kernel can read
    without changing it for all threads."""

    def opened(name: str, flags: int) -> int:
        if mode is None:
            return os.open(name, flags, 0o666)
        handle = os.open(name, flags, mode)
        os.fchmod(handle, mode)  # whatever the umask says
        return handle

    return opened


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
