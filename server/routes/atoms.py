"""/v1/atoms: the cards of a package's atoms, and, for admin keys, the training documents behind them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from atoms.errors import PackageCorruptError, UnknownAtomError
from atoms.manifest import AtomCard
from atoms.package import Package
from server.errors import ConflictError, DocumentsNotFoundError, PermissionDeniedError
from server.responses import JSONResponse


def atoms_router(package: Package, *, allow_training_text: bool) -> APIRouter:
    """Reads `package` only."""
    router = APIRouter()

    def sent(card: AtomCard) -> dict[str, Any]:
        """All of the manifest's entry, and the display name."""
        shown = card if allow_training_text else card.without_prose
        return {"object": "atom", "name": card.name, **shown.model_dump(mode="json")}

    @router.get("/v1/atoms", response_model=None)
    async def list_atoms() -> Response:
        cards = [sent(card) for card in package.manifest.atoms]
        return JSONResponse({"object": "list", "package": _identity(package), "data": cards})

    @router.get("/v1/atoms/{atom}", response_model=None)
    async def show_atom(atom: str) -> Response:
        return JSONResponse(sent(_card(package, atom)))

    @router.get("/v1/atoms/{atom}/documents", response_model=None)
    def show_documents(atom: str, request: Request) -> Response:  # reads a file: runs on a worker thread
        if not request.state.admin:
            raise PermissionDeniedError("training documents need an admin key; send one")
        if not allow_training_text:
            raise PermissionDeniedError("this server is set not to show training documents to anybody")
        card = _card(package, atom)
        evidence = _evidence(package)
        if not evidence:
            raise DocumentsNotFoundError(f"package {package.manifest.name!r} was made without documents")
        documents: list[object] = next((line["documents"] for line in evidence if line["atom"] == card.id), [])
        return JSONResponse({"object": "list", "atom": card.id, "data": documents})

    return router


def _evidence(package: Package) -> list[dict[str, Any]]:
    """Raises ConflictError where the path holds another version than the one that is served."""
    try:
        return package.evidence()
    except PackageCorruptError as error:
        raise ConflictError(
            f"the documents of version {package.manifest.version} of package {package.manifest.name!r} are no longer at its "
            "path; reload the server to serve what lies there now"
        ) from error


def _card(package: Package, name: str) -> AtomCard:
    """The atom named in a path. Raises UnknownAtomError."""
    try:
        return package.card(name[:128])
    except UnknownAtomError as error:
        raise UnknownAtomError(str(error), param="atom") from error  # the package blames a field of the body


def _identity(package: Package) -> dict[str, str]:
    return {"name": package.manifest.name, "version": package.manifest.version}
