"""Where measurements put their results."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoms.errors import ConfigError
from clients.harness import results_of


@pytest.mark.parametrize("package", ["package", "here/..", "."])
def test_results_lie_beside_the_package_whatever_it_is_called_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (tmp_path / "package" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path if package == "package" else tmp_path / "package")
    assert results_of(Path(package), "sweep", None).resolve() == tmp_path / "package.sweep"
    with pytest.raises(ConfigError, match="lies in the package"):
        results_of(Path(package), "sweep", Path(package) / "x")
