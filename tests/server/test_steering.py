"""The steering table of the wire format, row by row and error by error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from atoms.errors import AtomsteerError, CoefficientError, ConfigError, DriftBudgetError, MixError, UnknownAtomError
from atoms.package import Package
from server.config import ServeConfig
from server.errors import (
    ExperimentNotFoundError,
    InvalidFieldError,
    ModelNotFoundError,
    PermissionDeniedError,
    PresetNotFoundError,
)
from server.limits import Limits
from server.steering import Steering


@pytest.fixture
def steering(package: Package, config: ServeConfig) -> Steering:
    return Steering.of(package, replace(config, default_mix="list=0.5", limits=Limits(max_atoms_per_mix=2)))


def test_absent_and_null_give_the_default_mix(steering: Steering, ids: list[str]) -> None:
    assert steering.resolve(None).mix.as_dict() == {ids[0]: 0.5}
    assert steering.resolve({}).mix.as_dict() == {ids[0]: 0.5}


def test_no_default_mix_means_unsteered(package: Package, config: ServeConfig) -> None:
    resolved = Steering.of(package, config).resolve(None)
    assert not resolved.mix
    assert resolved.echo() == {
        "mix": resolved.digest, "atoms": {}, "predicted_kl": 0.0, "scaled_by": 1.0, "preset": None,
        "experiment": None, "arm": None, "phase": "all",
    }  # fmt: skip


def test_empty_atoms_are_explicitly_unsteered(steering: Steering) -> None:
    assert not steering.resolve({"atoms": {}}).mix


def test_atoms_resolve_by_alias_and_id_are_rounded_and_zeros_dropped(steering: Steering, ids: list[str]) -> None:
    resolved = steering.resolve({"atoms": {"formal": 1.00004, ids[0]: 0}})
    assert resolved.mix.as_dict() == {ids[1]: 1.0}
    assert resolved.digest == steering.resolve({"atoms": {ids[1]: 1}}).digest
    assert resolved.predicted_kl == 0.05
    assert resolved.echo()["atoms"] == {ids[1]: 1.0}


def test_atoms_replace_the_default_mix(steering: Steering, ids: list[str]) -> None:
    assert steering.resolve({"atoms": {"formal": -1}}).mix.as_dict() == {ids[1]: -1.0}


def test_a_preset_by_field_or_by_model(steering: Steering, ids: list[str]) -> None:
    by_field = steering.resolve({"preset": "polite"})
    assert by_field.mix.as_dict() == {ids[0]: -1.0, ids[1]: 1.0}
    assert by_field.preset == "polite"
    assert steering.resolve(None, model_preset="polite") == by_field


def test_atoms_override_a_preset_entry_by_entry(steering: Steering, ids: list[str]) -> None:
    mix = steering.resolve({"preset": "polite", "atoms": {"list": 0, "formal": 2}}).mix
    assert mix.as_dict() == {ids[1]: 2.0}
    by_model = steering.resolve({"atoms": {ids[0]: 2}}, model_preset="polite").mix
    assert by_model.as_dict() == {ids[0]: 2.0, ids[1]: 1.0}


def test_model_names(steering: Steering) -> None:
    assert steering.preset_of_model("demo") is None
    assert steering.preset_of_model("demo:polite") == "polite"
    with pytest.raises(ModelNotFoundError, match="serves 'demo'"):
        steering.preset_of_model("gpt-4")
    with pytest.raises(PresetNotFoundError) as caught:
        steering.preset_of_model("demo:rude")
    assert caught.value.param == "model"


def test_a_budget_is_a_bound(steering: Steering) -> None:
    assert steering.resolve({"atoms": {"list": 1}, "max_kl": 0.05}).scaled_by == 1.0
    with pytest.raises(DriftBudgetError, match=r"0\.2 nats a token and max_kl is 0\.05"):
        steering.resolve({"atoms": {"list": 2}, "max_kl": 0.05, "on_exceed": "error"})


@pytest.mark.parametrize("atoms", [{"list": 2}, {"list": 2.7, "formal": -1.3333}, {"formal": 3, "list": 0.0001}])
@pytest.mark.parametrize("budget", [0.05, 0.0123, 1e-6, 0])
def test_scaling_meets_the_budget_and_keeps_the_direction(
    steering: Steering, atoms: dict[str, float], budget: float
) -> None:
    resolved = steering.resolve({"atoms": atoms, "max_kl": budget, "on_exceed": "scale"})
    assert resolved.predicted_kl <= budget
    assert 0 <= resolved.scaled_by < 1
    for name, value in atoms.items():
        applied = resolved.mix.as_dict().get(steering.package.card(name).id, 0.0)
        assert applied == pytest.approx(value * resolved.scaled_by, abs=1.001e-4)


def test_scaling_survives_a_cross_term_that_rounding_raises(package: Package, config: ServeConfig) -> None:
    steering = Steering.of(package, config)
    for step in range(1, 60):
        resolved = steering.resolve({"atoms": {"formal": 2.0, package.manifest.atoms[2].id: step / 20}, "max_kl": 3e-5,
                                     "on_exceed": "scale"})  # fmt: skip
        assert resolved.predicted_kl <= 3e-5


def test_the_default_mix_obeys_a_budget_too(steering: Steering) -> None:
    with pytest.raises(DriftBudgetError):
        steering.resolve({"max_kl": 0.001})


def test_out_of_range_is_for_admins(steering: Steering, ids: list[str]) -> None:
    with pytest.raises(CoefficientError, match=r"3\.5 of atom 'list' lies outside its tested range -3 to 3") as caught:
        steering.resolve({"atoms": {"list": 3.5}})
    assert caught.value.param == "steering.atoms.list"
    with pytest.raises(CoefficientError):
        steering.resolve({"atoms": {"list": 3.5}}, admin=True)
    with pytest.raises(PermissionDeniedError):
        steering.resolve({"atoms": {"list": 3.5}, "allow_out_of_range": True})
    resolved = steering.resolve({"atoms": {"list": 3.5}, "allow_out_of_range": True}, admin=True)
    assert resolved.mix.as_dict() == {ids[0]: 3.5}


def test_null_fields_are_absent(steering: Steering) -> None:
    fields = ("atoms", "preset", "experiment", "max_kl", "on_exceed", "allow_out_of_range", "phase")
    assert steering.resolve(dict.fromkeys(fields)) == steering.resolve(None)


@pytest.mark.parametrize(
    ("value", "error", "param"),
    [
        ([], InvalidFieldError, "steering"),
        ("list=1", InvalidFieldError, "steering"),
        (True, InvalidFieldError, "steering"),
        ({"atom": {}}, InvalidFieldError, "steering.atom"),
        ({"atoms": []}, InvalidFieldError, "steering.atoms"),
        ({"atoms": {"list": "1"}}, InvalidFieldError, "steering.atoms.list"),
        ({"atoms": {"list": True}}, InvalidFieldError, "steering.atoms.list"),
        ({"atoms": {"list": None}}, InvalidFieldError, "steering.atoms.list"),
        ({"atoms": {"list": math.nan}}, CoefficientError, "steering.atoms.list"),
        ({"atoms": {"list": -math.inf}}, CoefficientError, "steering.atoms.list"),
        ({"atoms": {"list": 10**400}}, CoefficientError, "steering.atoms.list"),
        ({"atoms": {"list": 3.0001}}, CoefficientError, "steering.atoms.list"),
        ({"atoms": {"lits": 1}}, UnknownAtomError, "steering.atoms.lits"),
        ({"atoms": {"lits": 0}}, UnknownAtomError, "steering.atoms.lits"),
        ({"atoms": {"": 1}}, UnknownAtomError, "steering.atoms."),
        ({"atoms": {"x" * 100_000: 1}}, UnknownAtomError, "steering.atoms"),
        ({"atoms": {"list": 0, "formal": 0, "other": 0}}, MixError, "steering.atoms"),
        ({"preset": 1}, InvalidFieldError, "steering.preset"),
        ({"preset": "rude"}, PresetNotFoundError, "steering.preset"),
        ({"preset": ""}, PresetNotFoundError, "steering.preset"),
        ({"experiment": 1}, InvalidFieldError, "steering.experiment"),
        ({"experiment": "e1"}, ExperimentNotFoundError, "steering.experiment"),
        ({"experiment": "e1", "atoms": {}}, InvalidFieldError, "steering.atoms"),
        ({"experiment": "e1", "preset": "polite"}, InvalidFieldError, "steering.preset"),
        ({"experiment": "e1", "max_kl": 1}, InvalidFieldError, "steering.max_kl"),
        ({"max_kl": "1"}, InvalidFieldError, "steering.max_kl"),
        ({"max_kl": True}, InvalidFieldError, "steering.max_kl"),
        ({"max_kl": -0.1}, InvalidFieldError, "steering.max_kl"),
        ({"max_kl": math.nan}, InvalidFieldError, "steering.max_kl"),
        ({"max_kl": math.inf}, InvalidFieldError, "steering.max_kl"),
        ({"max_kl": 10**400}, InvalidFieldError, "steering.max_kl"),
        ({"on_exceed": "clip"}, InvalidFieldError, "steering.on_exceed"),
        ({"on_exceed": ["error"]}, InvalidFieldError, "steering.on_exceed"),
        ({"allow_out_of_range": 1}, InvalidFieldError, "steering.allow_out_of_range"),
        ({"phase": "prompt"}, InvalidFieldError, "steering.phase"),
        ({"phase": ["all"]}, InvalidFieldError, "steering.phase"),
        ({"experiment": "e1", "phase": "decode"}, InvalidFieldError, "steering.phase"),
        ({"allow_out_of_range": "true"}, InvalidFieldError, "steering.allow_out_of_range"),
    ],
)
def test_bad_steering_is_refused(steering: Steering, value: object, error: type[AtomsteerError], param: str) -> None:
    with pytest.raises(error) as caught:
        steering.resolve(value)
    assert caught.value.param == param
    assert len(str(caught.value)) < 400, "an error must not send a long input back"


def test_one_atom_under_two_names_is_refused(steering: Steering, ids: list[str]) -> None:
    with pytest.raises(MixError, match="named twice"):
        steering.resolve({"atoms": {"list": 1, ids[0]: 1}})


def test_two_presets_are_refused(steering: Steering) -> None:
    with pytest.raises(InvalidFieldError, match="both given"):
        steering.resolve({"preset": "polite"}, model_preset="polite")


def test_a_preset_and_atoms_together_keep_the_limit(steering: Steering, ids: list[str]) -> None:
    with pytest.raises(MixError, match="3 atoms and the limit is 2"):
        steering.resolve({"preset": "polite", "atoms": {ids[2]: 1}})


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, presets=("bad=nothing=1",)),
        lambda c: replace(c, presets=("bad=list=9",)),
        lambda c: replace(c, default_mix="list=nan"),
        lambda c: replace(c, default_mix="list"),
    ],
)
def test_a_server_with_unusable_mixes_does_not_start(
    package: Package, config: ServeConfig, change: Callable[[ServeConfig], ServeConfig]
) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        Steering.of(package, change(config))


def test_a_phase_is_echoed_and_part_of_the_digest(steering: Steering) -> None:
    whole, decode = (steering.resolve({"atoms": {"list": 1}, "phase": phase}) for phase in ("all", "decode"))
    assert (whole.phase, decode.phase) == ("all", "decode") == (whole.echo()["phase"], decode.echo()["phase"])
    assert decode.digest == f"{whole.digest}-decode"
    assert whole.digest == steering.resolve({"atoms": {"list": 1}}).digest
    assert steering.resolve({"preset": "polite", "phase": "decode"}).phase == "decode"


def test_no_mix_is_the_same_in_both_phases(steering: Steering) -> None:
    assert steering.resolve({"atoms": {}, "phase": "decode"}).digest == steering.resolve({"atoms": {}}).digest


def test_digests_differ_by_coefficient(steering: Steering) -> None:
    digests = {steering.resolve({"atoms": {"list": c}}).digest for c in (0, 1, 1.0001, -1)}
    assert len(digests) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"prefix_cache_tokens": -1},
        {"prefix_cache_tokens": 1.5},
        {"port": 70000},
        {"port": "80"},
        {"host": " "},
        {"slots": 0},
        {"max_waiting": True},
        {"max_model_len": 1},
        {"dtype": "int8"},
        {"shutdown_timeout": math.inf},
        {"shutdown_timeout": -1},
        {"served_model_name": "a b"},
        {"served_model_name": "demo:x"},
        {"api_keys": ("",)},
        {"admin_keys": ("a b",)},
        {"presets": ("x",)},
        {"presets": ("x=",)},
        {"presets": ("x y=list=1",)},
        {"presets": ("x=list=1", "x=list=2")},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ServeConfig(package=Path("p"), **settings)  # type: ignore[arg-type]


def test_bad_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_n is 0"):
        Limits(max_n=0)


def test_keys_come_from_the_environment_and_stay_out_of_repr() -> None:
    environment = {"ATOMSTEER_API_KEY": "k1, k2,", "ATOMSTEER_ADMIN_KEY": "boss"}
    config = ServeConfig(package=Path("p")).with_environment(environment)
    assert config.api_keys == ("k1", "k2")
    assert config.admin_keys == ("boss",)
    assert "k1" not in repr(config)
    assert ServeConfig(package=Path("p"), api_keys=("mine",)).with_environment(environment).api_keys == ("mine",)
