"""From settings to vLLM's command line and environment, and back in its processes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atoms.errors import ConfigError
from atoms.package import Package
from server.config import ServeConfig
from server.limits import Limits
from server.vllm import plugin
from server.vllm.serve import arguments, environment
from server.vllm.settings import FIELDS, check, read_settings, to_environment


def test_settings_come_back_as_they_were(config: ServeConfig) -> None:
    config = replace(
        config, api_keys=("k1", "k2"), admin_keys=("adm",), default_mix="list=1", database="sqlite:////x.db",
        allow_training_text=False, access_log=False, served_model_name="other", limits=Limits(max_atoms_per_mix=3),
    )  # fmt: skip
    assert read_settings(to_environment(config)) == config


def test_links_stay_links(config: ServeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are switched while the server runs: to another version of the package, or to new keys."""
    (tmp_path / "first").mkdir()
    (tmp_path / "link").symlink_to("first")
    monkeypatch.chdir(tmp_path)
    read = read_settings(to_environment(replace(config, package=Path("link"), api_key_file=Path("link/keys.json"))))
    assert read is not None
    assert (read.package, read.api_key_file) == (tmp_path / "link", tmp_path / "link" / "keys.json")


def test_without_a_package_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings({}) is None
    monkeypatch.delenv("ATOMSTEER_PACKAGE", raising=False)
    plugin.register()  # imports nothing of vLLM, which is not installed here


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "valid JSON"),
        ("[]", "JSON list"),
        ('{"port": 1}', "'port'"),
        ('{"limits": {"most": 1}}', "most"),
        ('{"presets": ["x"]}', "name=atom"),
    ],
)
def test_settings_that_cannot_work_are_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_settings({"ATOMSTEER_PACKAGE": "x", "ATOMSTEER_SETTINGS": text})


def test_every_setting_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "vllm.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| `ATOMSTEER_SETTINGS`"))
    assert [name for name in FIELDS if f"`{name}`" not in row] == []


def test_presets_are_checked_before_a_model_is_loaded(package: Package, config: ServeConfig) -> None:
    check(package, config)
    with pytest.raises(ConfigError, match="unknown atom 'nope'"):
        check(package, replace(config, presets=("x=nope=1",)))


def test_the_command_line_says_what_the_settings_say(package: Package, config: ServeConfig) -> None:
    config = replace(
        config, model="base", port=8001, slots=64, max_waiting=10, dtype="bfloat16", cors_origins=("https://a",)
    )
    line = arguments(config, package, ["--tensor-parallel-size", "2"])
    assert line[:2] == ["serve", "base"] and line[-2:] == ["--tensor-parallel-size", "2"]
    assert {"--served-model-name=demo", "--port=8001", "--max-num-seqs=64", "--max-num-queued-reqs=74", "--dtype=bfloat16",
            '--allowed-origins=["https://a"]', "--shutdown-timeout=30", "--host=127.0.0.1"} <= set(line)  # fmt: skip
    assert not any(option.startswith(("--max-model-len", "--revision")) for option in line)


def test_vllms_own_options_win_where_both_are_given(package: Package, config: ServeConfig) -> None:
    line = arguments(config, package, ["--max-num-seqs=8"])
    assert [option for option in line if option.startswith("--max-num-seqs")] == ["--max-num-seqs=8"]


@pytest.mark.parametrize("option", ["--enable-lora", "--lora-modules", "--api-key=x", "--load-format=dummy"])
def test_options_that_would_break_steering_are_refused(package: Package, config: ServeConfig, option: str) -> None:
    with pytest.raises(ConfigError, match="atomsteer's to set"):
        arguments(config, package, [option])


@pytest.mark.parametrize("value", [["--max-loras", "1"], ["--max-loras=1"]])
def test_a_number_of_mixes_that_would_be_ignored_is_refused(
    package: Package, config: ServeConfig, value: list[str]
) -> None:
    with pytest.raises(ConfigError, match="give 2 or more"):
        arguments(config, package, value)
    assert arguments(config, package, ["--max-loras", "16"])[-2:] == ["--max-loras", "16"]


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cpu"},
        {"port": 0},
        {"prefill_tokens_per_step": 64},
        {"prefix_cache_tokens": 0},
        {"limits": Limits(max_stop=2)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_vllm_cannot_follow_are_refused(package: Package, config: ServeConfig, changes: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes)) if "limits" not in changes else "max_stop"):
        arguments(replace(config, **changes), package)


@pytest.mark.parametrize("option", [["--root-path", "/llm"], ["--root-path=/llm"]])
def test_a_root_path_is_refused(package: Package, config: ServeConfig, option: list[str]) -> None:
    with pytest.raises(ConfigError, match="root path"):
        arguments(config, package, option)


def test_keys_are_in_the_environment_and_not_on_the_command_line(package: Package, config: ServeConfig) -> None:
    config = replace(config, api_keys=("secret-key",), admin_keys=("secret-admin",))
    assert "secret" not in " ".join(arguments(config, package))
    variables = environment(config, {"VLLM_PLUGINS": "theirs"})
    assert variables["ATOMSTEER_API_KEY"] == "secret-key" and variables["VLLM_PLUGINS"] == "theirs,atomsteer"


def engine_arguments(**changes: Any) -> SimpleNamespace:
    """vLLM's defaults, of what we look at."""
    plain = {"load_format": "auto", "speculative_config": None, "worker_extension_cls": "", "enable_sleep_mode": False,
             "kv_transfer_config": None, "kv_offloading_size": None, "kv_offloading_backend": "native"}  # fmt: skip
    return SimpleNamespace(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_format": "gguf"}, "load format 'gguf'"),
        ({"speculative_config": {}}, "--speculative-config"),
        ({"worker_extension_cls": "theirs.Worker"}, "--worker-extension-cls"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "--kv-transfer-config"),
        ({"kv_offloading_size": 4.0, "kv_offloading_backend": "lmcache"}, "'lmcache'.*backend native"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_steering_cannot_go_with_ends_the_start(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plugin.refuse_arguments(engine_arguments(**changes))


@pytest.mark.parametrize("changes", [{}, {"kv_offloading_size": 4.0}, {"kv_offloading_backend": "lmcache"}])
def test_what_vllm_keeps_by_its_own_hashes_may_be_offloaded(changes: dict[str, Any]) -> None:
    """Those of blocks hold the mix; without a size nothing is offloaded."""
    plugin.refuse_arguments(engine_arguments(**changes))


@pytest.mark.parametrize("plugins", [None, "", "others"])
def test_a_server_that_would_ignore_steering_does_not_start(
    monkeypatch: pytest.MonkeyPatch, package: Package, plugins: str | None
) -> None:
    monkeypatch.setenv("ATOMSTEER_PACKAGE", str(package.path))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    with pytest.raises(ConfigError, match="could not be steered"):
        plugin.register()
    assert os.environ.get("VLLM_PLUGINS") == plugins


def test_our_packages_are_known_to_be_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin._require_own_packages()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="an environment of its own"):
        plugin._require_own_packages()
