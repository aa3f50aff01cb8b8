"""OpenAI's clients for servers of others: nothing that the environment holds for OpenAI is sent to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

    Client = TypeVar("Client", OpenAI, AsyncOpenAI)


def without_environment(client: Client) -> Client:
    """`client` without what its constructor has read from ``OPENAI_ORG_ID``, ``OPENAI_CUSTOM_HEADERS`` and the like."""
    client.organization = client.project = client.webhook_secret = client.admin_api_key = None
    client._custom_headers = {}  # no argument of the constructor keeps the variable out
    return client
