"""What works on a package without generating: inspect, report, label, describe, export, attribute."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from clients.options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    MixOption,
    ModelOption,
    PackageArgument,
    numbers,
    quiet_libraries,
    refuse_given,
)

app = typer.Typer()


@app.command()
def inspect(
    package: PackageArgument,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as JSON.")] = False,
) -> None:
    """Show a package's atoms as a table. Verifies every file first."""
    from atoms.package import Package
    from clients.package_table import package_table
    from clients.tables import print_table

    opened = Package.read(package)
    if as_json:
        print(opened.manifest.model_dump_json(indent=2))
        return
    print_table(package_table(opened))


@app.command()
def report(
    package: PackageArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; default: report.html in the package.")
    ] = None,
    no_documents: Annotated[bool, typer.Option("--no-documents", help="Leave training text out of the page.")] = False,
) -> None:
    """Make a package's report.html again: one page with a map, a card an atom, and the run record."""
    from atoms.package import Package, refuse_inside
    from offline.report import write_report

    if out is not None:
        refuse_inside(package, out)
    print(write_report(Package.read(package), out, documents=not no_documents))


@app.command()
def label(
    context: typer.Context,
    package: PackageArgument,
    atom: Annotated[str | None, typer.Argument(help="Id or alias of the atom.")] = None,
    alias: Annotated[str | None, typer.Argument(help="Its new alias.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the atom's alias.")] = False,
    from_detectors: Annotated[
        bool,
        typer.Option("--from-detectors", help="Measure effects; name each atom after the detector it raises most."),
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Evaluation prompts; default: the demo's development prompts.")
    ] = None,
    coefficients: Annotated[str, typer.Option(help="Where effects are measured.")] = "-2,2",
    prompts_per_behaviour: Annotated[int, typer.Option(help="Neutral development prompts of each behaviour.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 32,
    slots: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 32,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Name an atom, or name all atoms by their measured effect."""
    from atoms.package import Package
    from clients.labels import label_from_detectors
    from offline.progress import Progress
    from offline.report import write_report
    from server.embedded.load import EngineOptions

    opened = Package.read(package)
    if from_detectors:
        if atom or alias or remove:
            raise typer.BadParameter("--from-detectors names all atoms; leave ID and ALIAS out")
        quiet_libraries()
        options = EngineOptions(model=model, device=device, dtype=dtype, slots=slots)
        named = label_from_detectors(
            opened, prompts, numbers(coefficients), prompts_per_behaviour, max_tokens, options, Progress()
        )
        count = sum(card.alias is not None for card in named.manifest.atoms)
        print(f"{package}: {count} of {len(named.manifest.atoms)} atoms named")
        return
    measuring = ("prompts", "coefficients", "prompts_per_behaviour", "max_tokens", "slots", "model", "device", "dtype")
    refuse_given(context, measuring, "nothing is measured without --from-detectors")
    if atom is None or (alias is None) != remove:
        raise typer.BadParameter("give ID and ALIAS, ID and --remove, or --from-detectors")
    write_report(opened.relabel(atom, alias))
    print(f"{opened.card(atom).id} is now {alias or 'without an alias'}")


@app.command()
def describe(
    package: PackageArgument,
    server: Annotated[
        str, typer.Option("--server", help="URL of an OpenAI-compatible API, which sees training documents.")
    ],
    key: Annotated[
        str | None, typer.Option("--key", envvar="ATOMSTEER_DESCRIBE_KEY", help="Key of that server.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the server's model; default: the only one that it lists.")
    ] = None,
    documents: Annotated[
        int, typer.Option(min=1, max=20, help="Documents shown of the atom, and as many of others.")
    ] = 6,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens, thoughts included.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="Of the answers; default: the server's own.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also atoms that this model has described already.")] = False,
) -> None:
    """Have a language model say in a sentence what each atom's documents have in common. Status 1 if an atom got none."""
    from atoms.package import Package
    from clients.describe import Asking, describe_atoms

    asking = Asking(model, documents, max_tokens, temperature)
    described = describe_atoms(Package.read(package), server, key, asking, again=again)
    for card in map(described.package.card, described.done):
        print(f"{card.name}: {card.description}")
    kept = f"; {described.before} were before (--again asks about them anew)" if described.before else ""
    print(f"{package}: {len(described.done)} atoms described by {described.model}{kept}")
    for name, reason in described.failed.items():
        print(f"{name}: {reason}", file=sys.stderr)
    if described.failed:
        raise typer.Exit(1)


@app.command()
def export(
    package: PackageArgument,
    out: Annotated[Path, typer.Option("--out", help="Directory of the PEFT adapter to write.")],
    mix: MixOption = None,
    onto: Annotated[
        str, typer.Option(help="raw: for the base model; merged: for the base model with θ0 merged.")
    ] = "raw",
    force: ForceOption = False,
) -> None:
    """Write a mix as one PEFT adapter that stock PEFT and vLLM load. Without --mix: θ0 itself."""
    from atoms.mix import parse_mix
    from atoms.package import Package

    if onto not in ("raw", "merged"):
        raise typer.BadParameter(f"--onto is {onto!r}; it must be raw or merged")
    opened = Package.read(package)
    opened.export(opened.mix(parse_mix(mix or [])), out, onto=onto, replace=force)
    print(out)


@app.command()
def attribute(
    package: PackageArgument,
    text: Annotated[str | None, typer.Option(help="The response to attribute.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The user's message before --text; default: an empty one.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before --prompt.")] = None,
    messages: Annotated[
        str | None, typer.Option(help="A chat as JSON; its last turn is the assistant's response.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Many documents: JSONL (plain or .gz) or Parquet.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Atoms shown a document.")] = 5,
    examples: Annotated[int, typer.Option(min=0, help="Training documents shown an atom.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a document.")] = False,
    max_length: Annotated[
        int | None, typer.Option(min=16, help="Longest document in tokens; default: the discovery's.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=64, help="Padded tokens in one batch; bounds memory.")] = 512,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Show which atoms new documents are made of, the training documents behind them, and what is unexplained."""
    quiet_libraries()
    from clients.attribute import given_documents, print_attributions
    from server.embedded.load import EngineOptions

    documents = given_documents(text, prompt, system, messages, data)
    options = EngineOptions(model=model, device=device, dtype=dtype)
    print_attributions(package, documents, options, max_length=max_length, batch_tokens=batch_tokens, top=top,
                       examples=examples, as_json=as_json)  # fmt: skip
