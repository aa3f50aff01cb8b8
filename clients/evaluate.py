"""`evaluate`: measures a package's atoms on held-out prompts; tables, figures, and entries in its cards."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from atoms.errors import ConfigError, DataError
from atoms.package import Package
from atoms.storage import write_bytes, write_json
from clients.harness import open_harness, results_of
from clients.tables import WIDE, print_table
from offline.evaluation import figures
from offline.evaluation.answers import Decoding
from offline.evaluation.config import EvaluateConfig
from offline.evaluation.document_controls import DocumentControls, DocumentGroups, document_controls
from offline.evaluation.evaluate import evaluate, goals_of
from offline.evaluation.prompts import read_prompts
from offline.evaluation.results import (
    ATOM,
    UNSTEERED,
    Comparison,
    Condition,
    Evaluation,
    GoalResult,
    cards_with_effects,
    table_rows,
    to_csv,
)
from offline.progress import Progress
from offline.report import write_report
from offline.shipped import shipped_file
from server.embedded.load import EngineOptions, load_base


def run_evaluate(
    path: Path, config: EvaluateConfig, *, prompts: Path | None, out: Path | None, decoding: Decoding, options: EngineOptions,
    groups: DocumentGroups | None = None, write_cards: bool = False, plots: bool = True, quiet: bool = False,
) -> Evaluation:  # fmt: skip
    """Evaluates, or resumes in `out` (default: beside the package), and writes evaluation.json, .csv and figures there.

    `groups`: labelled documents, for the controls made of documents; of its labels only those that differ from their behaviour.
    """
    config.check_decoding(decoding)
    if plots:
        figures.require_matplotlib()
    package, progress = Package.read(path), Progress(quiet=quiet)
    prompts = prompts or shipped_file("evaluation_prompts")
    work = results_of(path, "evaluation", out)
    documents = _document_controls(package, config, prompts, groups, work, options, progress) if groups else None
    with open_harness(package, work, decoding, options) as harness:
        evaluation = evaluate(harness, prompts, config, work, progress, documents)
    write_json(work / "evaluation.json", evaluation.as_json())
    write_bytes(work / "evaluation.csv", to_csv(table_rows(evaluation)).encode())
    if plots:
        for name, figure in (
            ("dose-response", figures.dose_response(evaluation)),
            ("effects", figures.effects(evaluation)),
        ):
            if figure is not None:
                figures.save(figure, work / name)
    if write_cards:
        write_report(package.update(lambda cards: cards_with_effects(cards, evaluation)))
    print_table(evaluation_table(evaluation), WIDE)
    _print_end(evaluation, work, path if write_cards else None)
    return evaluation


def parse_labels(texts: list[str]) -> dict[str, str]:
    """Reads ``["bulleted-list=bulleted_list"]``. Raises ConfigError."""
    labels = {}
    for text in texts:
        behaviour, separator, label = text.partition("=")
        if not separator or not behaviour.strip() or not label.strip():
            raise ConfigError(
                f"--label {text!r} is not of the form BEHAVIOUR=LABEL, such as fenced-code=code_generation"
            )
        labels[behaviour.strip()] = label.strip()
    return labels


def evaluation_table(evaluation: Evaluation) -> Table:
    """One row a goal and condition; changes in points with 95% intervals."""
    prompts, decoding = evaluation.facts["prompts"], Decoding(**evaluation.facts["decoding"])
    table = Table(
        title=f"prompts {prompts['file']}, sha256 {prompts['sha256'][:16]}; answers {decoding}", title_justify="left"
    )
    for heading in ("goal", "condition", "n", "rate", "change", "p (Holm)", "atom beyond it", "KL", "predicted",
                    "perplexity", "degenerate", "tokens"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("goal", "condition") else "right")
    for result in evaluation.goals:
        for place, condition in enumerate(result.conditions):
            table.add_row(*_cells(result, condition, place), end_section=place == len(result.conditions) - 1)
    return table


def _cells(result: GoalResult, condition: Condition, place: int) -> list[str]:
    name, rate, change = condition.name, condition.rate, condition.to_unsteered
    if name == ATOM and result.choice:
        name = f"{result.choice.name} {result.choice.coefficient:+g}"
    elif name == UNSTEERED and result.choice is None:
        name = "unsteered (no setting within the limits)"
    return [
        str(result.goal) if place == 0 else "", name, str(rate.n),
        str(rate), _difference(change),
        f"{change.p_holm:.2g}" if change and condition.name == ATOM else "", _difference(condition.atom_beyond),
        f"{condition.kl:.3f}", "" if condition.predicted_kl is None else f"{condition.predicted_kl:.3f}",
        f"{condition.perplexity:.1f}", f"{condition.form.degenerate:.0%}", f"{condition.form.tokens:.0f}",
    ]  # fmt: skip


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    return f"{100 * comparison.difference:+.0f} [{100 * comparison.low:+.0f}, {100 * comparison.high:+.0f}]"


def _document_controls(
    package: Package, config: EvaluateConfig, prompts: Path, groups: DocumentGroups, work: Path, options: EngineOptions,
    progress: Progress,
) -> DocumentControls:  # fmt: skip
    """Directions for every behaviour that is evaluated, kept in `work`. The unmerged model is loaded for them, and dropped
    again."""
    behaviours = dict.fromkeys(goal.behaviour for goal in goals_of(read_prompts(prompts), config))
    if unknown := groups.labels.keys() - behaviours:
        raise ConfigError(
            f"--label names {', '.join(sorted(unknown))}, but what is evaluated is {', '.join(behaviours)}; leave it out"
        )
    labels = {behaviour: groups.labels.get(behaviour, behaviour) for behaviour in behaviours}
    if not groups.data.is_file():
        raise DataError(f"{groups.data} does not exist or is no file; give the labelled documents with --data")
    wanted = replace(groups, labels=labels, draws=config.random_controls, seed=config.seed)
    made = document_controls(package, wanted, lambda: load_base(package, options), work / "documents", progress)
    gc.collect()  # the unmerged model
    return made


def _print_end(evaluation: Evaluation, work: Path, updated: Path | None) -> None:
    chosen = [goal for goal in evaluation.goals if goal.choice]
    print(f"{work}: evaluation.json, evaluation.csv; {len(chosen)} of {len(evaluation.goals)} goals have a setting")
    if updated:
        print(
            f"{updated}: effects of {len({goal.choice.atom for goal in chosen if goal.choice})} atoms written to their cards"
        )
