"""Ids of mixes: one mix each, for ever."""

from __future__ import annotations

import pytest

from atoms.errors import EngineError
from atoms.mix import Mix
from server.vllm import identity
from server.vllm.identity import MixIdentities, decode_path, digest_of_name, encode_path

ONE, OTHER = Mix.of({"a-00000001": 1.5}), Mix.of({"a-00000001": -0.0001, "a-00000002": 3})


def test_equal_mixes_share_an_id_and_different_ones_do_not() -> None:
    identities = MixIdentities()
    assert identities.of(ONE, "m-1") == identities.of(ONE, "m-1")
    assert identities.of(ONE, "m-1").number != identities.of(OTHER, "m-2").number


def test_the_path_carries_the_mix_exactly() -> None:
    for mix in (ONE, OTHER, Mix.of({"a-1": 0.1234})):
        assert decode_path(encode_path(mix)) == mix


def test_processes_share_neither_ids_nor_names() -> None:
    count = 3
    ranges = [MixIdentities(rank, count) for rank in range(count)]
    given = [identities.of(mix, digest) for identities in ranges for mix, digest in ((ONE, "m-1"), (OTHER, "m-2"))]
    assert len({one.number for one in given}) == len({one.name for one in given}) == 6
    assert {digest_of_name(one.name) for one in given} == {"m-1", "m-2"}
    assert all(0 < one.number < 2**31 for one in given)


def test_a_forgotten_mix_gets_a_new_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_REMEMBERED", 2)
    identities = MixIdentities()
    first = identities.of(ONE, "m-1")
    for number in range(3):
        identities.of(OTHER, f"m-other-{number}")
    again = identities.of(ONE, "m-1")
    assert again.number > first.number and digest_of_name(again.name) == digest_of_name(first.name) == "m-1"
    assert again.name != first.name, "vLLM would load one of them and run both"


def test_used_up_ids_are_an_error_and_never_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_LAST_ID", 12)
    identities = MixIdentities(first=10)
    identities.of(ONE, "m-1"), identities.of(ONE, "m-2")
    with pytest.raises(EngineError, match="restart"):
        identities.of(ONE, "m-3")
