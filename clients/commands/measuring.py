"""What atoms do, measured: evaluate, sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clients.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    PackageArgument,
    names,
    numbers,
    quiet_libraries,
    refuse_given,
)

app = typer.Typer()


@app.command()
def evaluate(
    context: typer.Context,
    package: PackageArgument,
    prompts: Annotated[
        Path | None, typer.Option(help="Evaluation prompts (JSONL); default: those that ship with atomsteer.")
    ] = None,
    behaviours: Annotated[str, typer.Option(help="Behaviours, comma separated; default: all of the prompts.")] = "",
    goals: Annotated[str, typer.Option(help="up (neutral prompts), down (inviting ones), or both.")] = "up,down",
    atoms: Annotated[str, typer.Option(help="Atoms to choose from, comma separated; default: all.")] = "",
    coefficients: Annotated[str, typer.Option(help="Magnitudes to try, with both signs.")] = "1,1.5,2,2.5,3",
    max_kl: Annotated[float, typer.Option(help="Most KL of a choice, nats a token, predicted and measured.")] = 0.5,
    max_degenerate: Annotated[float, typer.Option(help="Largest share of degenerate answers of a choice.")] = 0.05,
    candidates: Annotated[int, typer.Option(help="Atoms a goal that are tried at every coefficient.")] = 3,
    shortlist: Annotated[int, typer.Option(help="Atoms a goal that are screened on all development prompts.")] = 8,
    screen_prompts: Annotated[int, typer.Option(help="Development prompts on which the shortlist is found.")] = 6,
    dev_prompts: Annotated[int | None, typer.Option(help="Development prompts a goal; default: all.")] = None,
    finalists: Annotated[int, typer.Option(help="Settings a goal that are given --dev-samples answers a prompt.")] = 6,
    dev_samples: Annotated[
        int | None, typer.Option(help="Answers a development prompt to choose from; default: 3, greedy 1.")
    ] = None,
    heldout_prompts: Annotated[int | None, typer.Option(help="Held-out prompts a goal; default: all.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 48,
    temperature: Annotated[float, typer.Option(help="Temperature of the answers; 0: greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Top-p of sampled answers.")] = 1.0,
    kl_prompts: Annotated[int, typer.Option(help="Prompts along whose answers KL is measured.")] = 24,
    random_controls: Annotated[
        int, typer.Option(help="Random directions a goal; with --data also of random documents.")
    ] = 1,
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled documents: adds the controls made of documents. Needs a backward pass."),
    ] = None,
    label_field: Annotated[str, typer.Option(help="Field of the documents that holds the label.")] = "task",
    label: Annotated[
        list[str] | None, typer.Option("--label", help="BEHAVIOUR=LABEL where the two differ; repeat for more.")
    ] = None,
    supervised_documents: Annotated[int, typer.Option(min=1, help="Labelled documents a behaviour.")] = 64,
    no_curve: Annotated[
        bool, typer.Option("--no-curve", help="Leave the other coefficients out of the held-out prompts.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Results and kept answers; default: PKG.evaluation.")
    ] = None,
    write_cards: Annotated[
        bool,
        typer.Option(
            "--write-cards",
            help="Write the held-out effects into the package's cards, in place of earlier ones.",
        ),
    ] = False,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="No figures; matplotlib is not needed then.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the controls and of sampled answers.")] = 0,
    slots: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 32,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure atoms on held-out prompts against controls of equal KL. Run again after a stop: it resumes."""
    quiet_libraries()
    from clients.evaluate import parse_labels, run_evaluate
    from offline.evaluation.answers import Decoding
    from offline.evaluation.config import EvaluateConfig
    from offline.evaluation.document_controls import DocumentGroups
    from server.embedded.load import EngineOptions

    if dev_samples is None:
        dev_samples = 3 if temperature else 1
    config = EvaluateConfig(
        behaviours=tuple(names(behaviours)), wanted=tuple(names(goals)), atoms=tuple(names(atoms)),  # type: ignore[arg-type]
        coefficients=numbers(coefficients), screen_prompts=screen_prompts, shortlist=shortlist, candidates=candidates,
        finalists=finalists,
        dev_prompts=dev_prompts, dev_samples=dev_samples, heldout_prompts=heldout_prompts, max_kl=max_kl,
        max_degenerate=max_degenerate, kl_prompts=kl_prompts, random_controls=random_controls, curve=not no_curve, seed=seed,
    )  # fmt: skip
    if not data:
        refuse_given(context, ["label", "label_field", "supervised_documents"], "they are of --data; give that too")
    if not temperature:
        refuse_given(context, ["top_p"], "greedy answers have none; give another --temperature")
    if dev_samples == 1:
        refuse_given(
            context, ["finalists"], "they are given more answers; give more --dev-samples, of a --temperature above 0"
        )
    groups = DocumentGroups(data, label_field, parse_labels(label or []), supervised_documents) if data else None
    run_evaluate(
        package, config, prompts=prompts, out=out, decoding=Decoding(max_tokens, temperature, top_p, seed), groups=groups,
        write_cards=write_cards, plots=not no_plots, quiet=quiet,
        options=EngineOptions(model=model, device=device, dtype=dtype, slots=slots),
    )  # fmt: skip


@app.command()
def sweep(
    context: typer.Context,
    package: PackageArgument,
    atoms: Annotated[str, typer.Option(help="Atoms, comma separated.")] = "",
    coefficients: Annotated[str, typer.Option(help="Coefficients of each atom, such as -2,-1,0,1,2.")] = "",
    combine: Annotated[
        bool, typer.Option("--combine", help="All combinations of the atoms' coefficients, not one atom at a time.")
    ] = False,
    mix: Annotated[
        list[str] | None, typer.Option("--mix", help='A further mix, "a=1,b=-1"; repeat for a list of mixes.')
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Evaluation prompts (JSONL); default: those that ship with atomsteer.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Plain prompts instead, one a line.")] = None,
    behaviours: Annotated[str, typer.Option(help="Keep prompts of these behaviours, comma separated.")] = "",
    kind: Annotated[str | None, typer.Option(help="Keep neutral or inviting prompts.")] = None,
    split: Annotated[str, typer.Option(help="Keep dev or heldout prompts.")] = "dev",
    limit: Annotated[int | None, typer.Option(min=1, help="Most prompts.")] = None,
    detectors: Annotated[str, typer.Option(help="Detectors, comma separated; default: all.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 48,
    temperature: Annotated[float, typer.Option(help="Temperature of the answers; 0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Top-p of sampled answers.")] = 1.0,
    kl_prompts: Annotated[int, typer.Option(min=1, help="Prompts along whose answers KL is measured.")] = 24,
    allow_out_of_range: Annotated[
        bool, typer.Option("--allow-out-of-range", help="Allow coefficients beyond an atom's tested range.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Results and kept answers; default: PKG.sweep.")] = None,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="No figures; matplotlib is not needed then.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.")] = 0,
    slots: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 32,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Answer prompts under many mixes and measure each: detectors, length, KL, perplexity. Resumes after a stop."""
    quiet_libraries()
    from clients.sweep import run_sweep, sweep_prompts
    from offline.evaluation.answers import Decoding
    from server.embedded.load import EngineOptions

    if texts:
        refuse_given(context, ["split"], "--texts holds plain prompts")
    if not atoms:
        refuse_given(context, ["combine"], "it is of --atoms and --coefficients")
    if not temperature:
        refuse_given(context, ["top_p", "seed"], "greedy answers have none; give --temperature")
    run_sweep(
        package, atoms=names(atoms), coefficients=numbers(coefficients), combine=combine, mixes=mix or [],
        prompts=sweep_prompts(prompts, texts, names(behaviours), kind, split, limit), detectors=names(detectors),
        decoding=Decoding(max_tokens, temperature, top_p, seed), kl_prompts=kl_prompts, out=out,
        allow_out_of_range=allow_out_of_range, plots=not no_plots, quiet=quiet,
        options=EngineOptions(model=model, device=device, dtype=dtype, slots=slots),
    )  # fmt: skip
