"""Packages: what was written is what is read, every corruption is refused by name, and nothing is left half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from atoms import storage
from atoms.adapter import adapter_delta, read_adapter, write_adapter
from atoms.errors import (
    AdapterError,
    AtomsteerError,
    CoefficientError,
    ConfigError,
    MixError,
    PackageCorruptError,
    PackageError,
    StorageError,
    UnknownAtomError,
    WrongBaseError,
)
from atoms.manifest import Effect, Manifest
from atoms.mix import Mix
from atoms.package import Package, PackageContents, refuse_inside, write_package


@pytest.fixture
def package(tiny_package: Package, tmp_path: Path) -> Package:
    """A copy that a test may damage."""
    shutil.copytree(tiny_package.path, tmp_path / "package")
    return Package.read(tmp_path / "package")


@pytest.fixture
def contents(tiny_package: Package) -> PackageContents:
    """What the tiny package was written from."""
    bank = tiny_package.bank
    return PackageContents(
        manifest=tiny_package.manifest.model_copy(update={"files": {}, "content_hash": ""}), base=bank.base,
        directions={atom: bank.direction(Mix.of({atom: 1.0})) for atom in bank.ids},
        drift=load_file(tiny_package.path / "drift.safetensors"), projection=tiny_package.projection_tensors,
        texts={name: (tiny_package.path / name).read_text(encoding="utf-8") for name in ("evidence.jsonl", "report.html")},
    )  # fmt: skip


def reseal(path: Path, change: Callable[[dict], None] = lambda _: None) -> None:
    """Makes all hashes of a package right again, as a forger would, after `change` of the manifest."""
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    data["files"] = {name: storage.sha256_file(path / name) for name in data["files"]}
    manifest = Manifest.model_validate(data).sealed()
    (path / "manifest.json").write_text(manifest.model_dump_json())


def test_what_is_written_is_read(contents: PackageContents, tiny_package: Package, tmp_path: Path) -> None:
    written = write_package(tmp_path / "copy", contents)
    read = Package.read(tmp_path / "copy")
    assert read.manifest == written.manifest == tiny_package.manifest
    assert torch.equal(read.drift, tiny_package.drift)
    assert read.base_adapter.content_hash() == tiny_package.base_adapter.content_hash()
    for name in read.bank.a:
        assert torch.equal(read.bank.a[name], tiny_package.bank.a[name])
        assert torch.equal(read.bank.b[name], tiny_package.bank.b[name])
    assert read.evidence() == tiny_package.evidence()
    assert os.listdir(tmp_path) == ["copy"]


def test_evidence_may_hold_every_kind_of_line_end(contents: PackageContents, tmp_path: Path) -> None:
    line = json.loads(contents.texts["evidence.jsonl"].splitlines()[0]) | {"text": "one\u2028two\u2029three\u0085four"}
    texts = {**contents.texts, "evidence.jsonl": json.dumps(line, ensure_ascii=False) + "\n"}
    package = write_package(tmp_path / "copy", replace(contents, texts=texts))
    assert package.evidence() == [line]


def test_what_is_measured_for_hours_keeps_what_others_wrote_meanwhile(package: Package) -> None:
    first, second, *_ = package.manifest.atoms
    Package.read(package.path).relabel(second.id, "terse")
    effect = Effect(detector="yes-no", coefficient=1.0, n=20, rate_unsteered=0.25, rate=0.5)
    package.update(lambda cards: [card.model_copy(update={"effects": [effect]}) for card in cards])
    now = Package.read(package.path)
    assert now.card(second.id).alias == "terse" and now.card(first.id).effects == [effect]


def test_another_version_that_came_meanwhile_is_left_alone(
    package: Package, contents: PackageContents, tmp_path: Path
) -> None:
    other = {**contents.texts, "evidence.jsonl": ""}
    write_package(package.path, replace(contents, texts=other), replace=True)
    with pytest.raises(PackageError, match="was replaced by another version"):
        package.update(list)
    assert Package.read(package.path).evidence() == []


def test_nothing_is_written_into_a_package(package: Package, tmp_path: Path) -> None:
    for inside in (package.path, package.path / "x.html", package.path / "atoms" / ".." / "x"):
        with pytest.raises(ConfigError, match="lies in the package"):
            refuse_inside(package.path, inside)
    refuse_inside(package.path, package.path / "report.html")
    refuse_inside(package.path, package.path.with_name(package.path.name + ".evaluation"))
    with pytest.raises(ConfigError, match="lies in the package"):
        package.export(Mix(), package.path / "adapter")


def test_greedy_effects_are_written_as_older_packages_wrote_them(package: Package) -> None:
    """Their seals must hold: what they lack is left out where it says nothing."""
    greedy = Effect(detector="yes-no", coefficient=1.0, n=20, rate_unsteered=0.25, rate=0.5)
    sampled = greedy.model_copy(update={"coefficient": 2.0, "temperature": 0.7})
    full = sampled.model_copy(update={"prompts": "inviting", "degenerate": 0.0, "kl": 0.2, "rate_random": 0.0})
    package.edit(package.manifest.atoms[0].id, effects=[greedy, sampled, full])
    old, new, whole = json.loads((package.path / "manifest.json").read_text())["atoms"][0]["effects"]
    assert sorted(old) == ["coefficient", "detector", "n", "rate", "rate_unsteered"]
    assert new["temperature"] == 0.7
    assert (whole["degenerate"], whole["rate_random"]) == (0, 0), "nothing of 100 is not the same as nothing measured"
    assert Package.read(package.path).manifest.atoms[0].effects == [greedy, sampled, full]


def test_an_alias_that_another_atom_was_given_meanwhile_is_refused(package: Package) -> None:
    first, second, *_ = package.manifest.atoms
    Package.read(package.path).relabel(second.id, "terse")
    with pytest.raises(PackageError, match="is already the name"):
        package.relabel(first.id, "terse")


def test_the_largest_effect_is_one_on_neutral_prompts(tiny_package: Package) -> None:
    small = Effect(detector="yes-no", coefficient=2.0, n=20, rate_unsteered=0.0, rate=0.3, prompts="neutral")
    lost = Effect(detector="yes-no", coefficient=-2.0, n=20, rate_unsteered=0.9, rate=0.0, prompts="inviting")
    card = tiny_package.manifest.atoms[0]
    assert card.model_copy(update={"effects": [lost, small]}).largest_effect == small
    assert card.model_copy(update={"effects": [lost]}).largest_effect == lost
    assert card.model_copy(update={"effects": []}).largest_effect is None


def test_ids_are_the_content_hashes_of_the_directions(tiny_package: Package) -> None:
    for card in tiny_package.manifest.atoms:
        direction = tiny_package.bank.direction(Mix.of({card.id: 1.0}))
        assert tiny_package.base_adapter.space.hash_tensors(direction) == card.content_hash
        assert card.id == f"a-{card.content_hash[:8]}"


ATOM_FILE = "atoms/{atom}/adapter_model.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "base/adapter_model.safetensors",
        ATOM_FILE,
        "drift.safetensors",
        "projection.safetensors",
        "evidence.jsonl",
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing"])
def test_a_damaged_file_is_refused_by_name(package: Package, name: str, damage: str) -> None:
    name = name.format(atom=package.manifest.atoms[0].id)
    file = package.path / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(PackageCorruptError, match=name):
        Package.read(package.path)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_the_report_is_no_part_of_the_content(package: Package, damage: str) -> None:
    """It is made again when labels change, so a package must read whatever state its report is in."""
    file = package.path / "report.html"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert Package.read(package.path).manifest == package.manifest
    assert "report.html" not in package.manifest.files


def test_an_extra_file_is_refused_by_name(package: Package) -> None:
    (package.path / "atoms" / "notes.txt").write_text("mine")
    with pytest.raises(PackageCorruptError, match="atoms/notes.txt"):
        Package.read(package.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["atoms"][0].update(tested_range=[-99, 99]),
        lambda data: data["conventions"].update(composition="parameter"),
        lambda data: data.update(adapter_hash="0" * 64),
        lambda data: data["record"].update(documents=10**6),
        lambda data: data["files"].pop("evidence.jsonl"),
    ],
    ids=["range", "composition", "adapter hash", "record", "files"],
)
def test_an_edited_manifest_is_refused(package: Package, change: Callable[[dict], None]) -> None:
    file = package.path / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(PackageCorruptError, match="manifest.json"):
        Package.read(package.path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format_version": 1}', "\udcff"], ids=["empty", "cut", "list", "bare", "bytes"]
)
def test_an_unreadable_manifest_is_refused(package: Package, text: str) -> None:
    (package.path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PackageCorruptError, match="manifest.json"):
        Package.read(package.path)


def test_another_format_version_is_named(package: Package) -> None:
    file = package.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2, "new_field": 1}))
    with pytest.raises(PackageError, match="format 2.*reads format 1"):
        Package.read(package.path)


def test_no_package_is_said_to_be_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(PackageError, match="atomsteer discover"):
            Package.read(path)


@pytest.mark.parametrize("alias", ["an id", "another's alias"])
def test_a_hand_edited_alias_may_not_hide_another_atom(package: Package, alias: str) -> None:
    file = package.path / "manifest.json"
    data = json.loads(file.read_text())
    data["atoms"][1]["alias"] = "twin"
    data["atoms"][0]["alias"] = data["atoms"][1]["id"] if alias == "an id" else "twin"
    file.write_text(json.dumps(data))
    with pytest.raises(PackageCorruptError, match="manifest.json"):
        Package.read(package.path)


def replace_base(package: Package) -> None:
    """Puts another adapter of the same shape at base/."""
    adapter = read_adapter(package.path / "base")
    tensors = {key: value * 1.01 for key, value in adapter.tensors.items()}
    other = type(adapter)(adapter.space, tensors, adapter.targets)
    write_adapter(package.path / "base", adapter_delta(other), adapter.targets, package.manifest.base_model.id)


def test_a_stale_base_adapter_is_refused_though_file_hashes_fit(package: Package) -> None:
    replace_base(package)
    reseal(package.path)
    with pytest.raises(PackageCorruptError, match="base is not the adapter"):
        _ = Package.read(package.path).bank


def test_atoms_of_another_base_adapter_are_refused_though_all_hashes_fit(package: Package) -> None:
    replace_base(package)
    new_hash = read_adapter(package.path / "base").content_hash()
    reseal(package.path, lambda data: data.update(adapter_hash=new_hash))
    with pytest.raises(WrongBaseError, match=package.manifest.atoms[0].id):
        _ = Package.read(package.path).bank


def test_an_atom_swapped_for_another_is_refused(package: Package) -> None:
    first, second = (package.path / "atoms" / card.id for card in package.manifest.atoms[:2])
    shutil.rmtree(first)
    shutil.copytree(second, first)
    reseal(package.path)
    with pytest.raises(PackageCorruptError, match=first.name):
        _ = Package.read(package.path).bank


def test_the_right_base_passes_and_others_are_told_apart(tiny_package: Package, tiny_model: PreTrainedModel) -> None:
    tiny_package.check_base(tiny_model)
    config = LlamaConfig(**{**tiny_model.config.to_dict(), "num_hidden_layers": 3})
    with pytest.raises(WrongBaseError, match="another architecture"):
        tiny_package.check_base(LlamaForCausalLM(config))
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.up_proj.weight += 0.01
    with pytest.raises(WrongBaseError, match="other weights"):
        tiny_package.check_base(tiny_model)


def test_the_base_is_recognised_in_other_dtypes_of_bf16_weights(
    tiny_package: Package, tiny_model: PreTrainedModel
) -> None:
    from atoms.model import weights_fingerprint

    tiny_model.to(torch.bfloat16)
    prints = {weights_fingerprint(tiny_model.to(dtype)) for dtype in (torch.bfloat16, torch.float32)}
    assert len(prints) == 1


def test_an_alias_changes_no_hash_and_no_digest(package: Package) -> None:
    atom = package.manifest.atoms[0].id
    mix = package.mix({atom: 1.0})
    named = package.relabel(atom, "calm-tone")
    assert named.manifest.content_hash == package.manifest.content_hash
    assert Package.read(package.path).manifest == named.manifest
    assert named.mix({"calm-tone": 1.0}) == mix and named.digest(named.mix({"calm-tone": 1.0})) == package.digest(mix)
    with pytest.raises(MixError, match="named twice"):
        named.mix({"calm-tone": 1.0, atom: 2.0})
    assert named.relabel("calm-tone", None).card(atom).alias is None


@pytest.mark.parametrize(
    "alias", ["", " ", "two words", "a-12345678", "a-b", "-dash", "x" * 65, "comma,", "a=b", "a/b", "new\nline"]
)
def test_aliases_that_read_as_something_else_are_refused(package: Package, alias: str) -> None:
    with pytest.raises(PackageError, match="alias"):
        package.relabel(package.manifest.atoms[0].id, alias)
    assert Package.read(package.path).manifest == package.manifest


def test_aliases_are_unique_and_an_atom_may_keep_its_own(package: Package) -> None:
    first, second = (card.id for card in package.manifest.atoms[:2])
    named = package.relabel(first, "tone")
    assert named.relabel(first, "tone").card("tone").id == first
    with pytest.raises(PackageError, match=f"'tone' is already the name of atom {first}"):
        named.relabel(second, "tone")


def test_unknown_atoms_are_answered_with_near_names(package: Package) -> None:
    named = package.relabel(package.manifest.atoms[0].id, "bulleted-list")
    with pytest.raises(UnknownAtomError, match="'buleted-list'.*bulleted-list") as error:
        named.mix({"buleted-list": 1.0})
    assert error.value.param == "steering.atoms.buleted-list"
    with pytest.raises(UnknownAtomError):
        named.relabel("nobody", "x")


def test_the_tested_range_is_enforced_inclusively(tiny_package: Package) -> None:
    atom = tiny_package.manifest.atoms[0].id
    tiny_package.check_range(tiny_package.mix({atom: 1.0}))
    tiny_package.check_range(tiny_package.mix({atom: -1.0}))
    with pytest.raises(CoefficientError, match=r"1\.0001 .*tested range -1 to 1"):
        tiny_package.check_range(tiny_package.mix({atom: 1.0001}))


def test_an_existing_path_is_kept_unless_replaced(contents: PackageContents, tmp_path: Path) -> None:
    out = tmp_path / "package"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(StorageError, match="--force"):
        write_package(out, contents)
    with pytest.raises(StorageError, match=r"holds no manifest\.json.*--force"):
        write_package(out, contents, replace=True)
    assert os.listdir(out) == ["precious"]
    (out / "precious").unlink()
    assert Package.read(write_package(out, contents, replace=True).path)
    assert Package.read(write_package(out, contents, replace=True).path)
    assert os.listdir(tmp_path) == ["package"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("after", [0, 1, 5, 9])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_a_full_disk_leaves_nothing_behind(
    contents: PackageContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, after: int, existing: bool
) -> None:
    if existing:
        write_package(tmp_path / "package", contents)
    before = sorted(tmp_path.rglob("*"))
    fail_from(monkeypatch, failing, after)
    with pytest.raises(StorageError, match="No space left on device.*Free disk space"):
        write_package(tmp_path / "package", contents, replace=existing)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before, "a failed write left something behind, or took something away"


@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_a_failure_of_the_very_last_rename_restores_what_was_there(
    contents: PackageContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        write_package(tmp_path / "package", contents)
    before = sorted(tmp_path.rglob("*"))
    real = os.replace

    def fail_into_place(source: Path, target: Path) -> None:
        if (
            Path(target) == tmp_path / "package"
            and Path(source).name.startswith(".package.")
            and "replaced" not in str(source)
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(storage.os, "replace", fail_into_place)
    with pytest.raises(StorageError):
        write_package(tmp_path / "package", contents, replace=existing)
    assert sorted(tmp_path.rglob("*")) == before


def fail_from(monkeypatch: pytest.MonkeyPatch, function: str, after: int) -> None:
    """The disk is full from call number `after` of os.<function> on."""
    real, calls = getattr(os, function), iter(range(10**6))

    def full(*arguments: object) -> object:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(storage.os, function, full)


def test_a_relabel_on_a_full_disk_keeps_the_old_manifest(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_from(monkeypatch, "fsync", 0)
    with pytest.raises(StorageError, match="manifest.json"):
        package.relabel(package.manifest.atoms[0].id, "tone")
    assert Package.read(package.path).manifest == package.manifest


def test_an_export_of_nothing_is_the_base_adapter_or_refused(tiny_package: Package, tmp_path: Path) -> None:
    tiny_package.export(Mix(), tmp_path / "theta0")
    assert read_adapter(tmp_path / "theta0").content_hash() == tiny_package.base_adapter.content_hash()
    with pytest.raises(MixError, match="empty"):
        tiny_package.export(Mix(), tmp_path / "nothing", onto="merged")
    assert not (tmp_path / "nothing").exists()


def test_every_refusal_is_one_of_ours() -> None:
    for error in (PackageCorruptError, WrongBaseError, StorageError, UnknownAtomError, CoefficientError):
        assert issubclass(error, AtomsteerError)


def test_safetensors_that_lie_about_their_shape_are_refused(package: Package) -> None:
    file = package.path / "base" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, file)
    reseal(package.path)
    with pytest.raises(PackageCorruptError):
        _ = Package.read(package.path).bank


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_though_all_hashes_fit(
    contents: PackageContents, tmp_path: Path, number: float
) -> None:
    card = contents.manifest.atoms[0]
    direction = {key: tensor.clone() for key, tensor in contents.directions[card.id].items()}
    next(iter(direction.values()))[0, 0] = number
    sealed = card.model_copy(update={"content_hash": contents.base.space.hash_tensors(direction)})
    manifest = contents.manifest.model_copy(update={"atoms": [sealed, *contents.manifest.atoms[1:]]})
    drift = {"M": contents.drift["M"].clone().fill_(number)}
    broken = replace(contents, manifest=manifest, directions={**contents.directions, card.id: direction}, drift=drift)
    package = Package.read(write_package(tmp_path / "broken", broken).path)
    with pytest.raises(AdapterError, match=f"{card.id}: .* has a number that is not finite"):
        _ = package.bank
    with pytest.raises(PackageCorruptError, match=r"drift\.safetensors has a number that is not finite"):
        _ = package.drift


def test_what_has_been_read_outlives_its_files(package: Package) -> None:
    """Of a file that is mapped, a page that is gone ends the process."""
    atom = package.path / "atoms" / package.manifest.atoms[0].id
    held = [*package.base_adapter.tensors.values(), *read_adapter(atom).tensors.values(), package.drift]
    before = [tensor.clone() for tensor in held]
    for directory in (package.path / "base", atom, package.path):
        for file in directory.glob("*.safetensors"):
            os.truncate(file, 0)
    assert all(map(torch.equal, held, before))
