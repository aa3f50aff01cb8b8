"""How a mix travels through vLLM: as a LoRA request whose name is the mix's digest and id, and whose path is the mix itself.

vLLM keys its prefix cache by name and path, and its slots by the integer id. An id stands for one mix for ever: a
reused one would silently serve the old weights. A mix that does not steer the prompt has a digest, a name and an id of
its own; what follows from that is in phase.py.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import NamedTuple

from atoms.engine import Phase
from atoms.errors import EngineError
from atoms.mix import DECODE_SUFFIX, Mix

_PREFIX = "mix:"
_LAST_ID = 2**31 - 1  # vLLM keeps ids as int32
_REMEMBERED = 65_536


class MixIdentity(NamedTuple):
    """The three fields of a LoRA request."""

    name: str
    number: int
    path: str


class MixIdentities:
    """Gives mixes their ids, in the API process `rank` of `count`. `first` ids are left to vLLM's warm-up.

    The ranges of processes are disjoint. A name has its id in it: in a batch vLLM takes two requests of one name for one
    adapter, whatever their ids, and would leave the second id without weights. (A mix has two ids where two processes
    know it, or where it was forgotten and asked for again while the first is still in use.)
    """

    def __init__(self, rank: int = 0, count: int = 1, first: int = 65_536) -> None:
        span = (_LAST_ID - first) // count
        self._next = first + rank * span
        self._end = self._next + span
        self._known: OrderedDict[str, MixIdentity] = OrderedDict()

    def of(self, mix: Mix, digest: str) -> MixIdentity:
        """The same for equal mixes, as long as it is among the last 65,536 used. Raises EngineError without an id left."""
        known = self._known.get(digest)
        if known is None:
            if self._next >= self._end:
                raise EngineError("all ids for mixes have been used; restart the server")
            known = MixIdentity(f"{digest}@{self._next}", self._next, encode_path(mix))
            self._next += 1
            self._known[digest] = known
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(digest)
        return known


def encode_path(mix: Mix) -> str:
    return _PREFIX + json.dumps(mix.as_dict(), separators=(",", ":"))


def is_mix(path: str) -> bool:
    return path.startswith(_PREFIX)


def decode_path(path: str) -> Mix:
    """Inverse of `encode_path`."""
    return Mix.of(json.loads(path.removeprefix(_PREFIX)))


def digest_of_name(name: str) -> str:
    """The digest in a LoRA request's name."""
    return name.partition("@")[0]


def phase_of_name(name: str) -> Phase:
    """Which tokens a LoRA request of that name steers."""
    return "decode" if digest_of_name(name).endswith(DECODE_SUFFIX) else "all"
