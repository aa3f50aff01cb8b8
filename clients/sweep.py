"""`sweep`: prompts × mixes with everything measured; a table, CSV, Parquet, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from atoms.detectors import DETECTORS, get_detector
from atoms.errors import ConfigError
from atoms.mix import Mix, parse_mix
from atoms.package import Package
from atoms.storage import write_bytes
from clients.harness import open_harness, results_of
from clients.tables import WIDE, print_table
from offline.evaluation import figures
from offline.evaluation.answers import Decoding
from offline.evaluation.prompts import read_prompts, read_text
from offline.evaluation.results import to_csv
from offline.evaluation.sweep import SweepRow, grid, lines, moving, sweep, table_rows, to_parquet
from offline.progress import Progress
from offline.shipped import shipped_file
from server.embedded.load import EngineOptions

_SHOWN_DETECTORS = 5


def run_sweep(
    path: Path, *, atoms: Sequence[str], coefficients: Sequence[float], combine: bool, mixes: Sequence[str],
    prompts: Sequence[str], detectors: Sequence[str], decoding: Decoding, kl_prompts: int, out: Path | None,
    options: EngineOptions, allow_out_of_range: bool = False, plots: bool = True, quiet: bool = False,
) -> list[SweepRow]:  # fmt: skip
    """Sweeps, or resumes in `out` (default: beside the package), and writes sweep.csv, sweep.parquet and figures there.

    Raises MixError and its kin before the model is loaded.
    """
    if plots:
        figures.require_matplotlib()
    package = Package.read(path)
    chosen = sweep_mixes(package, atoms, coefficients, combine, mixes)
    if not allow_out_of_range:
        for mix in chosen:
            package.check_range(mix)
    names = [get_detector(name).name for name in detectors] or list(DETECTORS)
    work = results_of(path, "sweep", out)
    with open_harness(package, work, decoding, options) as harness:
        rows = sweep(harness, prompts, chosen, names, kl_prompts, Progress(quiet=quiet))
    flat = table_rows(rows, decoding)
    write_bytes(work / "sweep.csv", to_csv(flat).encode())
    write_bytes(work / "sweep.parquet", to_parquet(flat))
    if plots:
        _save_figures(rows, package, atoms, names, combine, work)
    shown = detectors or moving(rows, _SHOWN_DETECTORS)
    print_table(sweep_table(rows, shown, decoding), WIDE)
    print(f"{work}: sweep.csv, sweep.parquet, {len(prompts)} prompts, {len(rows)} mixes")
    return rows


def sweep_mixes(
    package: Package, atoms: Sequence[str], coefficients: Sequence[float], combine: bool, mixes: Sequence[str]
) -> list[Mix]:
    """The mixes of a sweep: atoms × coefficients, one by one or combined, and those that are listed.

    Raises ConfigError if that is none, MixError and its kin for a mix that cannot be.
    """
    if bool(atoms) != bool(coefficients):
        raise ConfigError("--atoms and --coefficients belong together: give both, or a list of mixes with --mix")
    made = (grid if combine else lines)(package, atoms, coefficients) if atoms else []
    made += [package.mix(parse_mix(text)) for text in mixes]
    if not made:
        raise ConfigError("there is no mix to sweep over; give --atoms with --coefficients, or --mix")
    return made


def sweep_prompts(
    file: Path | None,
    texts: Path | None,
    behaviours: Sequence[str],
    kind: str | None,
    split: str | None,
    limit: int | None,
) -> list[str]:
    """Prompts of an evaluation file (default: the shipped one) that fit, or the lines of a text file.

    Raises DataError, and ConfigError if filters are given for a text file, or leave nothing.
    """
    if texts is not None:
        if file or behaviours or kind:
            raise ConfigError("--texts holds plain prompts; leave --prompts, --behaviours and --kind out")
        return [line.strip() for line in read_text(texts).splitlines() if line.strip()][:limit]
    rows = [
        row for row in read_prompts(file or shipped_file("evaluation_prompts"))
        if (not behaviours or row.behaviour in behaviours) and kind in (None, row.kind) and split in (None, row.split)
    ]  # fmt: skip
    if not rows:
        raise ConfigError(
            "no prompt fits; choose other --behaviours, --kind (neutral, inviting) or --split (dev, heldout)"
        )
    return [row.prompt for row in rows][:limit]


def sweep_table(rows: Sequence[SweepRow], detectors: Sequence[str], decoding: Decoding) -> Table:
    """One row a mix: rates of `detectors` with 95% intervals, and what the mix costs."""
    form = rows[0].rates[detectors[0]]
    table = Table(title=f"{form.n} prompts, answers {decoding}; rates with 95% intervals", title_justify="left")
    table.add_column("mix", no_wrap=True)
    for heading in (*detectors, "KL", "predicted", "perplexity", "degenerate", "tokens"):
        table.add_column(heading, justify="right")
    for row in rows:
        shares = [row.rates[name] for name in detectors]
        table.add_row(
            row.label, *map(str, shares), f"{row.kl:.3f}",
            f"{row.predicted_kl:.3f}", f"{row.perplexity:.1f}", f"{row.form.degenerate:.0%}", f"{row.form.tokens:.0f}",
        )  # fmt: skip
    return table


def _save_figures(
    rows: Sequence[SweepRow],
    package: Package,
    atoms: Sequence[str],
    detectors: Sequence[str],
    combine: bool,
    work: Path,
) -> None:
    names = [package.card(atom).name for atom in atoms]
    if combine and len(names) == 2:
        for detector in detectors if len(detectors) <= _SHOWN_DETECTORS else moving(rows, 2):
            figures.save(figures.sweep_heatmap(rows, (names[0], names[1]), detector), work / f"heatmap-{detector}")
        return
    for name in names:
        figures.save(figures.sweep_lines(rows, name), work / f"dose-response-{name}")
