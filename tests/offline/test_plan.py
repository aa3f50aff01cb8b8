"""The dry run: counts are those of the real run, every stage of a real run is planned, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from atoms.errors import DataError
from atoms.package import Package
from clients.cli import main
from offline.config import RECIPES, DictionaryConfig, DiscoverConfig, FinetuneConfig, recipe_settings
from offline.corpus import EncodedDocument
from offline.pipeline import discover
from offline.plan import Plan, StagePlan, describe, make_plan, padded_tokens, probe_documents
from offline.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def planned(
    tiny_config: Callable[..., DiscoverConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, DiscoverConfig]:
    config = tiny_config(tmp_path_factory.mktemp("plan") / "package")
    return make_plan(config, QUIET), config


def test_the_counts_are_those_of_the_run(planned: tuple[Plan, DiscoverConfig], tiny_package: Package) -> None:
    plan, record = planned[0], tiny_package.manifest.record
    assert (plan.documents, plan.tokens) == (record["documents"], record["tokens"])
    assert (plan.skipped, plan.truncated) == (record["skipped_lines"], record["truncated_prompts"])
    space = tiny_package.base_adapter.space
    assert (plan.modules, plan.matrices, plan.parameters) == (len(space.modules), len(space.tensors), space.dim)
    tensors = tiny_package.projection_tensors
    assert plan.components == tensors["mean_row"].numel()
    assert plan.dictionary_atoms == len(tensors["dictionary"])
    assert plan.training == int(tensors["codes_per_document"].sum())
    assert plan.training + plan.held_out == plan.documents


def test_the_rows_on_disk_are_as_large_as_planned(planned: tuple[Plan, DiscoverConfig], tiny_package: Package) -> None:
    files = list((tiny_package.path.with_name("package.work") / "rows").glob("rows-*.safetensors"))
    assert files
    for file in files:
        with safe_open(file, framework="pt") as shard:
            count = shard.get_slice("document").get_shape()[0]
            assert shard.get_slice("row").get_shape() == [count, planned[0].components]
            assert shard.get_slice("sketch").get_shape() == [count, planned[0].sketch]
    assert sum(file.stat().st_size for file in files) == pytest.approx(planned[0].disk, rel=0.02, abs=4096)


def test_every_timed_stage_of_a_run_is_planned_in_order(
    planned: tuple[Plan, DiscoverConfig], tiny_package: Package
) -> None:
    """A stage that is renamed or added to the pipeline must be planned too."""
    names = [stage.name for stage in planned[0].stages]
    timed = list(tiny_package.manifest.record["timings"])
    assert [name for name in names if name in timed] == timed
    assert set(names) - set(timed) == {"eigenvectors", "continuations"}
    assert all(stage.seconds > 0 for stage in planned[0].stages)


@pytest.mark.parametrize("change", [{"halves": False}, {"dictionary": DictionaryConfig(atoms=30)}])
def test_halves_that_a_run_does_not_learn_are_not_planned(
    planned: tuple[Plan, DiscoverConfig], change: dict[str, object]
) -> None:
    """Asked to leave them out; more atoms than documents in a half."""
    names = [stage.name for stage in make_plan(dataclasses.replace(planned[1], **change), QUIET).stages]
    assert "second seed" in names and not any("half" in name for name in names)


def test_nothing_is_left_behind(
    planned: tuple[Plan, DiscoverConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not planned[1].out.exists() and not planned[1].work_dir.exists()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make_plan(planned[1], QUIET)
    assert list(tmp_path.iterdir()) == []


def test_twice_the_epochs_take_twice_the_time_of_the_fine_tune_alone(planned: tuple[Plan, DiscoverConfig]) -> None:
    plan, config = planned
    more = make_plan(dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, epochs=4)), QUIET)
    works = [{stage.name: stage.work for stage in p.stages} for p in (plan, more)]
    assert works[1].pop("fine-tune") == pytest.approx(2 * works[0].pop("fine-tune"), rel=0.1)
    assert works[0] == works[1]


def test_a_given_adapter_is_not_trained(
    planned: tuple[Plan, DiscoverConfig], tiny_package: Package, tmp_path: Path
) -> None:
    config = dataclasses.replace(planned[1], adapter=tiny_package.path / "base")
    plan = make_plan(config, QUIET)
    assert "fine-tune" not in [stage.name for stage in plan.stages]
    assert plan.parameters == planned[0].parameters
    assert str(config.adapter) in describe(plan, config)


def test_the_papers_recipe_is_planned_without_the_passes_that_it_lacks(planned: tuple[Plan, DiscoverConfig]) -> None:
    parts = {part: dataclasses.replace(getattr(planned[1], part), **recipe_settings("paper", part))
             for part in RECIPES["paper"]}  # fmt: skip
    plan = make_plan(dataclasses.replace(planned[1], **parts), QUIET)
    missing = ("eigenvalues", "directions")
    assert [stage.name for stage in plan.stages] == [s.name for s in planned[0].stages if s.name not in missing]
    assert set(missing) < {stage.name for stage in planned[0].stages}
    assert plan.learner_bytes > planned[0].learner_bytes == 0, "scikit-learn holds all rows"


def test_memory_grows_with_tokens_and_atoms_but_not_with_their_product(planned: tuple[Plan, DiscoverConfig]) -> None:
    """A million documents of 60 tokens and 10,000 atoms of 6,800 components: the figures of docs/cost-model.md."""
    plan = dataclasses.replace(planned[0], tokens=60_000_000, training=850_000, held_out=150_000, dictionary_atoms=10_000,
                               kept_atoms=500, components=6_800)  # fmt: skip
    ids, codes, cosines, blocks = 60_000_000 * 40, 850_000 * 150, 4 * 150_000 * 500, 20 * 10_000 * 6_800
    assert plan.learner_bytes == 0
    assert plan.growing_memory == ids + codes + cosines + blocks < 4 * 2**30


def test_an_existing_package_is_refused_as_by_the_run(
    planned: tuple[Plan, DiscoverConfig], tiny_package: Package
) -> None:
    config = dataclasses.replace(planned[1], out=tiny_package.path)
    for action in (make_plan, discover):
        with pytest.raises(DataError, match="exists already"):
            action(config, QUIET)


def test_a_bad_configuration_is_refused_as_by_the_run(planned: tuple[Plan, DiscoverConfig]) -> None:
    from atoms.errors import ModelError

    wrong = dataclasses.replace(planned[1], finetune=FinetuneConfig(target_modules=("c_attn",)))
    with pytest.raises(ModelError, match="c_attn"):
        make_plan(wrong, QUIET)


def test_work_is_padded_tokens_and_time_scales_with_it() -> None:
    documents = [EncodedDocument(n, (1,) * length, (2,) * 2) for n, length in enumerate((8, 6, 6, 3, 1))]
    assert padded_tokens(documents, 20) == 2 * 10 + 2 * 8 + 3  # (10, 8), (8, 5), (3)
    assert StagePlan("gradients", "padded tokens", 390, 39, 2.0).seconds == 20
    assert StagePlan("calibrate", "atoms × prompts", 4, 2, 1.0, fixed=3.0).seconds == 5
    assert StagePlan("eigenvectors", "", 0, 1, 0, 1.5).seconds == 1.5


def test_the_probe_is_about_a_batch_of_usual_length() -> None:
    documents = [EncodedDocument(n, (1,) * (4 + n % 40), (2,) * 4) for n in range(400)]
    sample = probe_documents(documents, 256)
    assert 128 <= padded_tokens(sample, 256) <= 300
    lengths = sorted(map(len, documents))
    assert lengths[40] < sum(map(len, sample)) / len(sample) < lengths[-40]
    assert probe_documents(documents[:1], 256) == documents[:1]


def test_the_command_prints_the_plan_and_writes_nothing(
    tiny_config: Callable[..., DiscoverConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = tiny_config(tmp_path / "package")
    options = ["--model", config.model, "--data", config.data, "--out", config.out, "--dtype", "float32", "--rank", "4",
               "--components", "20", "--calibration-prompts", "2", "--continuation-tokens", "8", "--dry-run"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["atomsteer", "discover", *map(str, options)])
    with pytest.raises(SystemExit) as status:
        main()
    out = capsys.readouterr().out
    assert not status.value.code and list(tmp_path.iterdir()) == []
    shown = (
        "48 read, 0 bad lines skipped, 0 prompts truncated",
        "gradients",
        "drift matrix",
        "in all",
        "measured in the probe",
        "probe of",
    )
    assert [word for word in shown if word not in out] == []
