"""The document of the API, against the application."""

from __future__ import annotations

from typing import Any

import jsonschema
from fastapi.routing import APIRoute
from httpx import AsyncClient

from server.embedded.app import Application
from server.embedded.openapi import OPERATIONS, openapi_document


def _routes(app: Application) -> set[tuple[str, str]]:
    routes = app._versions.current.app.routes  # type: ignore[attr-defined]
    found: set[tuple[str, str]] = set()

    def walk(routes: Any) -> None:
        for route in routes:
            if isinstance(route, APIRoute):
                found.update((method.lower(), route.path.replace(":path}", "}")) for method in route.methods)
            elif inner := getattr(getattr(route, "original_router", route), "routes", None):
                walk(inner)

    walk(routes)
    return found


async def test_every_route_is_described_and_nothing_else(client: AsyncClient) -> None:
    app = client._transport.app  # type: ignore[attr-defined]
    assert _routes(app) == {(operation.method, operation.path) for operation in OPERATIONS}


async def test_the_document_is_served_and_its_schemas_are_schemas(client: AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document == openapi_document()
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    chat = {"$ref": "#/components/schemas/ChatBody", "components": document["components"]}
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "steering": {"atoms": {"list": 1.5}}}
    jsonschema.validate(body, chat)
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
