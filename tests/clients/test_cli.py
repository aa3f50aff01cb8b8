"""The command line on a real package directory: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from atoms.adapter import read_adapter
from atoms.mix import Mix
from atoms.package import Package

Cli = Callable[..., tuple[int, str, str]]
COMMANDS = (
    "discover", "inspect", "report", "label", "export", "serve", "generate", "attribute", "evaluate", "sweep", "batch", "chat",
    "experiment", "preset", "db", "demo",
)  # fmt: skip


def test_help_lists_every_command(cli: Cli) -> None:
    status, out, _ = cli("--help")
    assert status == 0
    assert all(re.search(rf"\b{command}\b", out) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(cli: Cli, command: str) -> None:
    status, out, _ = cli(command, "--help")
    assert status == 0 and "--" in out


def test_the_version_is_the_distributions(cli: Cli) -> None:
    from importlib.metadata import version

    assert cli("--version")[:2] == (0, f"atomsteer {version('atomsteer')}\n")


def test_inspect_shows_every_atom(cli: Cli, package: Package) -> None:
    status, out, _ = cli("inspect", package.path)
    assert status == 0
    assert all(card.id in out for card in package.manifest.atoms)
    assert json.loads(cli("inspect", package.path, "--json")[1]) == json.loads(package.manifest.model_dump_json())


def test_label_names_and_unnames_an_atom(cli: Cli, package: Package) -> None:
    atom = package.manifest.atoms[0].id
    assert cli("label", package.path, atom, "calm")[0] == 0
    assert Package.read(package.path).card("calm").id == atom
    assert cli("label", package.path, "calm", "--remove")[0] == 0
    assert Package.read(package.path).card(atom).alias is None


@pytest.mark.parametrize("arguments", [["ID"], ["ID", "name", "--remove"], ["--from-detectors", "ID"]], ids=" ".join)
def test_label_refuses_half_an_order(cli: Cli, package: Package, arguments: list[str]) -> None:
    atom = package.manifest.atoms[0].id
    status, _, err = cli("label", package.path, *[atom if a == "ID" else a for a in arguments])
    assert status == 2 and "ID" in err
    assert Package.read(package.path).manifest == package.manifest


def test_export_writes_the_mix_as_an_adapter(cli: Cli, package: Package, tmp_path: Path) -> None:
    atom = package.manifest.atoms[0].id
    out = tmp_path / "adapter"
    assert cli("export", package.path, "--mix", f"{atom}=0.5", "--out", out, "--onto", "merged")[0] == 0
    expected = package.bank.compose(Mix.of({atom: 0.5}), "linear")
    assert expected is not None
    written = read_adapter(out)
    for module in written.space.modules:
        assert written.tensors[module.key_a].equal(expected[module.name].lora_A)
    status, _, err = cli("export", package.path, "--mix", f"{atom}=0.5", "--out", out)
    assert status == 2 and "--force" in err
    assert cli("export", package.path, "--mix", f"{atom}=0.5", "--out", out, "--force")[0] == 0


@pytest.mark.parametrize(
    ("mix", "named"),
    [
        ("nobody=1", "unknown atom 'nobody'"),
        ("ID=much", "name=coefficient"),
        ("ID=nan", "nan"),
        ("ID=1e9", "1000000000.0"),
    ],
)
def test_a_bad_mix_ends_with_status_2_and_the_value(
    cli: Cli, package: Package, tmp_path: Path, mix: str, named: str
) -> None:
    mix = mix.replace("ID", package.manifest.atoms[0].id)
    status, _, err = cli("export", package.path, "--mix", mix, "--out", tmp_path / "adapter")
    assert status == 2
    assert err.startswith("error: ") and named in err and "Traceback" not in err
    assert not (tmp_path / "adapter").exists()


def test_a_damaged_package_ends_with_status_2_and_the_file(cli: Cli, package: Package) -> None:
    file = package.path / "drift.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    status, out, err = cli("inspect", package.path)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and "drift.safetensors" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"--data": "absent.jsonl"}, "absent.jsonl"),
        ({"--model": "no/such/model"}, "no/such/model"),
        ({"--target-modules": "c_attn"}, "c_attn"),
        ({"--epochs": "0"}, "epochs is 0.0"),
        ({"--dtype": "int4"}, "int4"),
        ({"--device": "warp"}, "warp"),
    ],
    ids=["data", "model", "targets", "epochs", "dtype", "device"],
)
def test_discover_refuses_bad_input_and_leaves_no_package(
    cli: Cli,
    tiny_model_dir: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict,
    named: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {"--model": tiny_model_dir, "--data": tiny_data, "--out": tmp_path / "out", "--dtype": "float32"} | options
    status, _, err = cli("discover", *[part for pair in given.items() for part in pair])
    assert status == 2
    assert "error: " in err and named in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
