"""Sweeps: which mixes, what each row says, and the forms it is written in."""

from __future__ import annotations

import io
from collections.abc import Callable

import pyarrow.parquet
import pytest

from atoms.errors import ConfigError, UnknownDetectorError
from atoms.mix import Mix
from atoms.package import Package
from offline.evaluation.answers import Answer, Decoding
from offline.evaluation.measures import Form, Rate
from offline.evaluation.sweep import grid, lines, sweep, table_rows, to_parquet
from offline.progress import Progress


def test_lines_and_grids_are_the_products_they_say(tiny_package: Package) -> None:
    a, b = (card.id for card in tiny_package.manifest.atoms[:2])
    assert lines(tiny_package, [a, b], [-1, 1]) == [Mix.of({x: c}) for x in (a, b) for c in (-1, 1)]
    cells = grid(tiny_package, [a, b], [-1, 0, 1])
    assert len(set(cells)) == 9 and Mix.of({a: 1, b: -1}) in cells and Mix() in cells


def test_a_row_counts_the_mixs_answers(scripted: Callable, tiny_package: Package) -> None:
    atom = tiny_package.manifest.atoms[0].id
    harness, engine = scripted(lambda prompt, mix: "- a\n- b" if mix and prompt < "c" else "sea sea sea sea sea")
    prompts = ["a", "b", "c", "d"]
    rows = sweep(
        harness,
        prompts,
        [Mix.of({atom: 1.0}), Mix(), Mix.of({atom: 1.0})],
        ["bulleted-list", "yes-no"],
        2,
        Progress(quiet=True),
    )
    assert [row.label for row in rows] == ["unsteered", f"{tiny_package.card(atom).name}=1"]
    assert engine.asked == 8, "equal mixes are answered once"
    unsteered, steered = rows
    assert (unsteered.rates["bulleted-list"].count, steered.rates["bulleted-list"].count) == (0, 2)
    assert (unsteered.form.degenerate, steered.form.degenerate) == (1.0, 0.5)
    assert unsteered.kl == 0.0 and steered.kl > 0.0
    assert steered.predicted_kl == pytest.approx(tiny_package.predicted_kl(Mix.of({atom: 1.0})))
    texts = [
        Answer(p, Mix(), "sea sea sea sea sea", tuple(harness.directions.package.index.values()), "stop")
        for p in prompts
    ]
    assert Form.of(texts).words == unsteered.form.words == 5


def test_flat_rows_survive_parquet(scripted: Callable, tiny_package: Package) -> None:
    a, b = (card.id for card in tiny_package.manifest.atoms[:2])
    harness, _ = scripted(lambda prompt, mix: "Yes, it is." if mix else "It is.")
    rows = sweep(harness, ["x", "y"], grid(tiny_package, [a, b], [0, 1]), ["yes-no"], 2, Progress(quiet=True))
    flat = table_rows(rows, Decoding(16, temperature=0.7))
    assert {row["temperature"] for row in flat} == {0.7}
    assert [(row[f"c:{a}"], row[f"c:{b}"], row["yes-no"]) for row in flat] == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 1),
        (1, 1, 1),
    ]
    assert pyarrow.parquet.read_table(io.BytesIO(to_parquet(flat))).to_pylist() == flat


def test_nothing_to_sweep_is_refused(scripted: Callable) -> None:
    harness, _ = scripted(lambda prompt, mix: "")
    with pytest.raises(ConfigError, match="no prompt"):
        sweep(harness, [], [Mix()], ["yes-no"], 2, Progress(quiet=True))
    with pytest.raises(UnknownDetectorError, match="opera"):
        sweep(harness, ["x"], [Mix()], ["opera"], 2, Progress(quiet=True))


def test_a_rates_interval_holds_its_share() -> None:
    rate = Rate.of([True, False, False, True, True])
    assert (rate.count, rate.n, rate.share) == (3, 5, 0.6) and rate.low < 0.6 < rate.high
