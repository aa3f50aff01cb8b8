"""The command line on a real package directory: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest

from atoms.adapter import read_adapter
from atoms.mix import Mix
from atoms.package import Package
from clients.commands import discovery, serving
from offline.config import DiscoverConfig
from offline.evaluation.answers import Decoding
from offline.evaluation.config import EvaluateConfig

Cli = Callable[..., tuple[int, str, str]]
COMMANDS = (
    "discover", "inspect", "report", "label", "describe", "export", "serve", "generate", "attribute", "evaluate", "sweep", "batch", "chat",
    "experiment", "preset", "db", "keys", "demo",
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


def test_ctrl_c_ends_with_a_word_on_what_is_left(cli: Cli, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> Package:
        raise KeyboardInterrupt

    monkeypatch.setattr(Package, "read", interrupted)
    assert cli("inspect", package.path) == (130, "", "interrupted; what was finished is kept\n")


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
        ({"--calibration-prompts": "49"}, "prompts is 49; it must be 1 to 48"),
        ({"--dtype": "int4"}, "int4"),
        ({"--device": "warp"}, "warp"),
    ],
    ids=["data", "model", "targets", "epochs", "prompts", "dtype", "device"],
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


@pytest.mark.parametrize(
    "line",
    [
        "discover --model M --data D --out O --adapter A --rank 4",
        "discover --model M --data D --out O --adapter A --epochs 1",  # its default, and still said for nothing
        "discover --model M --data D --out O --recipe paper --eigenvalue-documents 8",
        "discover --model M --data D --out O --exponent 0",
        "evaluate P --label a=b",
        "evaluate P --supervised-documents 8",
        "evaluate P --temperature 0 --top-p 0.9",
        "evaluate P --temperature 0 --finalists 2",
        "sweep P --texts T --split dev",
        "sweep P --mix a=1 --combine",
        "sweep P --mix a=1 --top-p 0.9",
        "label P ID name --slots 4",
        "chat --package P --key k",
        "batch lines.jsonl --out O --package P --key k",
        "batch lines.jsonl --out O --package P --timeout 9",
        "batch lines.txt --out O --package P --column text",
    ],
)
def test_an_option_that_would_change_nothing_is_refused(cli: Cli, package: Package, line: str) -> None:
    parts = [{"P": package.path, "ID": package.manifest.atoms[0].id}.get(part, part) for part in line.split()]
    status, out, err = cli(*parts)
    flag = next(part for part in reversed(line.split()) if part.startswith("--"))
    assert (status, out) == (2, "")
    assert f"{flag} would change nothing: " in re.sub(r"[\s│]+", " ", err)


NUMBERS_OF_SERVE = [
    "--" + name.replace("_", "-")
    for name, kind in get_type_hints(serving.serve).items()
    if kind in (int, float, int | None)
]


@pytest.mark.parametrize("option", NUMBERS_OF_SERVE)
def test_a_number_that_a_server_cannot_have_is_refused_by_the_option_that_was_typed(
    cli: Cli, package: Package, option: str
) -> None:
    """And not by the name of a setting, such as `slots` for --max-num-seqs."""
    status, _, err = cli("serve", "--package", package.path, option, "-1")
    assert status == 2 and option.removeprefix("--") in err.replace("_", "-"), err


def test_what_discover_is_not_told_is_the_configurations_default(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Options write their defaults out, as `--help` must not load what the configuration needs."""
    asked = []
    monkeypatch.setattr(discovery, "discover_share", lambda config, quiet, ranks: asked.append(config))
    cli("discover", "--model", "M", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert asked == [DiscoverConfig(model="M", data=tmp_path / "data", out=tmp_path / "out")]


def test_what_evaluate_is_not_told_is_the_configurations_default(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, package: Package
) -> None:
    """But for the answers a prompt, which are for the temperature that it samples at."""
    asked = []
    monkeypatch.setattr(
        "clients.evaluate.run_evaluate", lambda _, config, **given: asked.append((config, given["decoding"]))
    )
    cli("evaluate", package.path)
    assert asked == [(EvaluateConfig(dev_samples=3), Decoding(48, temperature=0.7))]
