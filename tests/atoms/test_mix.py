"""Mixes are canonical: equal mixes compare, hash and digest equal, and everything else is refused by name."""

from __future__ import annotations

import math

import pytest

from atoms.errors import CoefficientError, MixError
from atoms.mix import MAX_COEFFICIENT, Mix, parse_mix

HASHES = {"a-1": "h1", "a-2": "h2"}


def digest(mix: Mix, fingerprint: str = "f", composition: str = "linear", hashes: dict[str, str] = HASHES) -> str:
    return mix.digest(fingerprint, composition, hashes)


def test_order_rounding_and_zeros_do_not_matter() -> None:
    one = Mix.of({"a-2": -1.0, "a-1": 0.5, "a-3": 0.00004})
    other = Mix.of({"a-1": 0.50004, "a-2": -0.99996, "a-4": 0.0, "a-5": -0.0})
    assert one == other and hash(one) == hash(other) and digest(one) == digest(other)
    assert one.as_dict() == {"a-1": 0.5, "a-2": -1.0}
    assert Mix.of({"a-1": 0.0}) == Mix() and not Mix()


def test_coefficients_survive_as_they_are_written() -> None:
    values = {f"a-{i}": i / 10000 for i in range(1, 3000, 7)}
    assert Mix.of(values).as_dict() == values
    assert Mix.of(Mix.of(values).as_dict()) == Mix.of(values)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, MAX_COEFFICIENT * 1.01, 10**400],
    ids=["nan", "inf", "-inf", "too large", "no float"],
)
def test_coefficients_that_are_no_number_are_refused_with_atom_and_value(value: float) -> None:
    with pytest.raises(CoefficientError, match="a-1") as error:
        Mix.of({"a-2": 1.0, "a-1": value})
    assert error.value.param == "steering.atoms.a-1"


def test_the_digest_sees_every_part() -> None:
    mix = Mix.of({"a-1": 1.0, "a-2": 2.0})
    digests = {
        digest(mix),
        digest(Mix.of({"a-1": 1.0001, "a-2": 2.0})),
        digest(Mix.of({"a-1": 2.0, "a-2": 1.0})),
        digest(Mix.of({"a-1": 1.0})),
        digest(Mix()),
        digest(mix, fingerprint="g"),
        digest(mix, composition="parameter"),
        digest(mix, hashes={"a-1": "h1", "a-2": "changed"}),
    }
    assert len(digests) == 8, "two different mixes share a cache identity"


def test_scaling_never_exceeds_the_factor() -> None:
    mix = Mix.of({"a-1": 1.0, "a-2": -0.0003})
    scaled = mix.scaled(1 / 3).as_dict()
    assert scaled == {"a-1": 0.3333, "a-2": -0.0001}
    assert mix.scaled(1.0) == mix
    assert mix.scaled(1e-9) == Mix()


def test_texts_are_parsed_and_names_may_hold_signs() -> None:
    assert parse_mix("bulleted-list=2, code = -1.5e0,") == {"bulleted-list": 2.0, "code": -1.5}
    assert parse_mix(["a=1", "b=2,c=3"]) == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert parse_mix("") == {} == parse_mix([])


@pytest.mark.parametrize("text", ["a", "a=", "=2", " =2", "a=two", "a=1=x", "a:2"])
def test_an_entry_of_another_form_is_quoted(text: str) -> None:
    with pytest.raises(MixError, match="name=coefficient"):
        parse_mix(text)


@pytest.mark.parametrize("number", ["nan", "inf", "-Infinity", "1e400"])
def test_a_coefficient_that_is_not_finite_is_refused(number: str) -> None:
    with pytest.raises(MixError, match="no finite coefficient"):
        parse_mix(f"a=1,b={number}")


def test_an_atom_given_twice_is_refused() -> None:
    with pytest.raises(MixError, match="'a' occurs twice"):
        parse_mix(["a=1", "b=1,a=2"])
