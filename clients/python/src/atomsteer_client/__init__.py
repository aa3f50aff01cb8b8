"""The OpenAI clients for atomsteer servers: `steering=` on every call that generates, and atoms, presets and experiments.

READ FIRST: `client.py`. What a mix looks like, and the echo of what was applied, are in `steering.py`.
"""

from atomsteer_client.client import AsyncClient, Client
from atomsteer_client.comparison import Compared
from atomsteer_client.models import Arm, Atom, Experiment, Preset
from atomsteer_client.steering import (
    Echo,
    SteeredChatCompletion,
    SteeredChatCompletionChunk,
    SteeredCompletion,
    SteeredResponse,
    Steering,
    SteeringIgnoredError,
    SteeringLike,
    echo_of,
)

__all__ = [
    "Arm",
    "AsyncClient",
    "Atom",
    "Client",
    "Compared",
    "Echo",
    "Experiment",
    "Preset",
    "SteeredChatCompletion",
    "SteeredChatCompletionChunk",
    "SteeredCompletion",
    "SteeredResponse",
    "Steering",
    "SteeringIgnoredError",
    "SteeringLike",
    "echo_of",
]
