"""Discovery shared by real processes: the same statistics and atoms as one process, and one failure ends all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from atoms.package import Package
from offline.config import DiscoverConfig
from offline.ranks import ALONE, Ranks
from offline.rows import RowStore

SHARED_RUN = """
import os, signal, sys
from dataclasses import replace
from pydantic import TypeAdapter
import offline.rows
from atoms.errors import AtomsteerError
from atoms.storage import write_tensors
from offline.pipeline import DiscoverConfig, discover
from offline.progress import Progress
from offline.ranks import run_ranks, torchrun_ranks

offline.rows.SHARD_DOCUMENTS = 16

def write_and_die(path, tensors):
    write_tensors(path, tensors)
    os.kill(os.getpid(), signal.SIGKILL)

def work(settings, trouble, ranks):
    config = TypeAdapter(DiscoverConfig).validate_json(settings)
    if ranks.rank == 1 and trouble == "dies":
        offline.rows.write_tensors = write_and_die
    if ranks.rank == 1 and trouble == "differs":
        config = replace(config, seed=7)
    discover(config, Progress(quiet=True), ranks)

if __name__ == "__main__":
    settings, count, trouble = sys.argv[1:]
    if count == "torchrun":
        with torchrun_ranks() as ranks:
            work(settings, trouble, ranks)
    else:
        try:
            run_ranks(work, int(count), settings, trouble)
        except AtomsteerError as error:
            sys.exit(f"error: {error}")
"""


@pytest.fixture
def shared_run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`shared_run(config, count, trouble)`: a discovery by `count` processes, or by three of torchrun."""
    script = tmp_path / "shared_run.py"
    script.write_text(SHARED_RUN)

    def run(config: DiscoverConfig, count: str, trouble: str = "none") -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"] if count == "torchrun" else []
        settings = TypeAdapter(DiscoverConfig).dump_json(config).decode()
        command = [sys.executable, *launcher, str(script), settings, count, trouble]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    return run


def check_same_discovery(package: Package, one: Package) -> None:
    """`package`, of several ranks, against the package of one."""
    files = [p.path.with_name("package.work") for p in (package, one)]
    theta, theta_one = (load_file(f / "adapter/theta0/adapter_model.safetensors") for f in files)
    assert max(float((theta[key] - theta_one[key]).abs().max()) for key in theta_one) < 1e-4, "θ0 differs"
    tensors, expected = package.projection_tensors, one.projection_tensors
    for name in expected:
        if name.endswith(".eigenvalues"):
            assert torch.allclose(tensors[name], expected[name], rtol=1e-3), f"{name}: ranks do not add up"
    stores = [RowStore(f / "rows") for f in files]
    assert len(stores[0].shards) == len(stores[1].shards) > 2
    rows, rows_one = (store.stored_rows(range(48)) for store in stores)
    assert float(torch.cosine_similarity(rows, rows_one).min()) > 0.999
    assert torch.allclose(stores[0].column("loss"), stores[1].column("loss"), rtol=1e-3)
    learned, learned_one = (load_file(f / "dictionary/dictionary.safetensors") for f in files)
    assert float(learned["objectives"][-1]) == pytest.approx(float(learned_one["objectives"][-1]), rel=1e-3)
    cosines = (learned["atoms"] @ learned_one["atoms"].T).abs()
    assert float(cosines.max(1).values.min()) > 0.999, "an atom of several ranks has no match among those of one"
    assert len(set(cosines.argmax(1).tolist())) == len(cosines)
    halves, halves_one = (load_file(f / "dictionary/halves.safetensors")["cosines"] for f in files)
    places = cosines.argmax(1)
    assert torch.allclose(halves, halves_one[:, places], atol=0.01), "halves of the documents differ"
    assert len(package.manifest.atoms) == len(one.manifest.atoms)


def test_two_processes_find_what_one_finds(
    shared_run: Callable, tiny_package: Package, tiny_config: Callable[..., DiscoverConfig], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "package")
    result = shared_run(config, "2")
    assert result.returncode == 0, result.stderr
    package = Package.read(config.out)
    assert package.manifest.record["ranks"] == 2
    check_same_discovery(package, tiny_package)


def test_a_rank_that_dies_ends_all_and_another_number_of_ranks_resumes(
    shared_run: Callable, tiny_package: Package, tiny_config: Callable[..., DiscoverConfig], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "package")
    result = shared_run(config, "2", "dies")
    assert result.returncode == 1
    assert "rank 1 of 2 was ended by signal 9; all were ended" in result.stderr
    assert "Traceback" not in result.stderr
    assert not config.out.exists()
    second_rank = config.work_dir / "rows" / "rows-00001.safetensors"
    written = second_rank.stat().st_mtime_ns
    resumed = shared_run(config, "torchrun")
    assert resumed.returncode == 0, resumed.stderr
    assert second_rank.stat().st_mtime_ns == written, "finished work was done again"
    check_same_discovery(Package.read(config.out), tiny_package)


def test_ranks_that_are_told_different_things_are_refused(
    shared_run: Callable, tiny_config: Callable[..., DiscoverConfig], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "package")
    result = shared_run(config, "2", "differs")
    assert result.returncode == 1
    assert "do not agree on the inputs of the stage adapter" in result.stderr
    assert "of 2 failed with status 2 (see above); all were ended" in result.stderr


def test_the_command_starts_ranks_and_names_the_one_that_failed(
    tiny_package: Package, tiny_config: Callable[..., DiscoverConfig]
) -> None:
    config = tiny_config(tiny_package.path)  # which exists
    command = [sys.executable, "-m", "clients.cli", "discover", "--model", config.model, "--data", str(config.data),
               "--out", str(config.out), "--ranks", "2"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert "error: " in result.stderr and "exists already" in result.stderr
    assert "of 2 failed with status 2 (see above); all were ended" in result.stderr
    refused = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "leave --ranks out" in refused.stderr


def test_shares_are_a_partition_and_one_rank_sends_nothing() -> None:
    items = list(range(11))
    parts = [list(Ranks(rank, 3).share(items)) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items and max(map(len, parts)) - min(map(len, parts)) <= 1
    tensor = torch.ones(3)
    ALONE.add(tensor)  # would raise without a process group
    assert torch.equal(ALONE.gather(tensor), torch.ones(3)) and ALONE.agree(True) and not ALONE.agree(False)
    ALONE.wait()
