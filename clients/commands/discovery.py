"""`discover` and `demo`: from documents to a package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.options import DeviceOption, DtypeOption, ForceOption, names, numbers, quiet_libraries, refuse_given

if TYPE_CHECKING:
    from offline.config import DiscoverConfig
    from offline.ranks import Ranks

app = typer.Typer()


@app.command()
def discover(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="Directory or hub id of a causal language model.")],
    data: Annotated[Path, typer.Option("--data", help="Documents: JSONL (plain or .gz) or Parquet.")],
    out: Annotated[Path, typer.Option("--out", help="Package directory to write.")],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="PEFT LoRA to start from; default: fine-tune one.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on its hub.")] = None,
    work: Annotated[Path | None, typer.Option(help="Working directory of resumable stages; default: OUT.work.")] = None,
    name: Annotated[str | None, typer.Option(help="Package name; default: the last part of OUT.")] = None,
    version: Annotated[str, typer.Option(help="Package version.")] = "1",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the run; same seed, same package.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Read at most this many documents.")] = None,
    max_length: Annotated[
        int, typer.Option(help="Longest document in tokens; longer prompts are cut on the left.")
    ] = 512,
    batch_tokens: Annotated[
        int, typer.Option(help="Padded tokens in a batch; passes for gradients take half of it at once. Bounds memory.")
    ] = 1024,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Count malformed lines instead of stopping.")
    ] = False,
    no_documents: Annotated[
        bool, typer.Option("--no-documents", help="Keep training text out of the package.")
    ] = False,
    target_modules: Annotated[str, typer.Option(help="Linears to adapt, comma separated.")] = "q_proj,v_proj",
    rank: Annotated[int, typer.Option(help="LoRA rank of the fine-tune.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="LoRA alpha of the fine-tune.")] = 16.0,
    epochs: Annotated[float, typer.Option(help="Epochs of the fine-tune; may be a fraction.")] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the fine-tune.")] = 1e-3,
    factor_documents: Annotated[int, typer.Option(help="Documents on which the eigenvectors are fitted.")] = 96,
    eigenvalue_documents: Annotated[int, typer.Option(help="Documents on which the eigenvalues are fitted.")] = 192,
    components: Annotated[int, typer.Option(help="Eigencomponents kept a LoRA matrix.")] = 50,
    damping: Annotated[
        float | None,
        typer.Option(
            help="Added to eigenvalues, relative to their mean in the matrix (with --recipe paper as it is); default: 0.1.",
            show_default=False,
        ),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(
            help="Share of the rows' variance above which a principal component is whitened, 0 for none; default: 0.01. "
            "At least 10 / documents.",
            show_default=False,
        ),
    ] = None,
    atoms: Annotated[
        int | None, typer.Option(help="Size of the dictionary; default: one atom per 16 training documents, 8 to 500.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="L1 penalty of the dictionary's codes.")] = 0.1,
    signed_codes: Annotated[
        bool | None,
        typer.Option("--signed-codes/--nonnegative-codes", help="Whether codes may be negative; default: no."),
    ] = None,
    halves: Annotated[
        bool,
        typer.Option(
            "--halves/--no-halves",
            help="Whether to learn two dictionaries of half of the documents each, which say if an atom is found again.",
        ),
    ] = True,
    recipe: Annotated[
        str, typer.Option(help="default, or paper: the published pipeline's choices, for comparison.")
    ] = "default",
    keep: Annotated[int, typer.Option(help="Most atoms to calibrate and package.")] = 48,
    min_documents: Annotated[
        int | None,
        typer.Option(help="Fewest documents that support an atom; default: half the dictionary's mean, at least 6."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Gradient steps on an atom's documents that make its direction, 0: the unprojected atom; default: 4.",
            show_default=False,
        ),
    ] = None,
    exponent: Annotated[
        float | None,
        typer.Option(help="Unprojection exponent p, -0.5 (natural step) to 0.5; default: 0.5. With --steps 0."),
    ] = None,
    composition: Annotated[str, typer.Option(help="linear or parameter.")] = "linear",
    calibration_prompts: Annotated[int, typer.Option(help="Neutral prompts on which drift is measured.")] = 16,
    continuation_tokens: Annotated[int, typer.Option(help="Tokens continued from each of them.")] = 24,
    coefficients: Annotated[
        str, typer.Option(help="Where the KL curve is measured; needs -1 and 1.")
    ] = "-3,-2,-1,1,2,3",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what a run would read, make and cost; probe it, write nothing.")
    ] = False,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="Processes of this machine that share the documents; or use torchrun.")
    ] = 1,
    force: ForceOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Find atoms of MODEL in DATA and write them as a package. Run again after a stop: it resumes."""
    from atoms.errors import ConfigError
    from offline.config import (
        CalibrateConfig,
        CurvatureConfig,
        DictionaryConfig,
        DiscoverConfig,
        FinetuneConfig,
        SelectConfig,
        SteeringConfig,
        WhiteningConfig,
        recipe_settings,
    )
    from offline.progress import Progress
    from offline.ranks import run_ranks, torchrun_ranks

    def settings(part: str, **given: object) -> dict[str, Any]:
        """The recipe's settings of a part, with what was asked for by an option on top."""
        return recipe_settings(recipe, part) | {name: value for name, value in given.items() if value is not None}

    nonnegative = None if signed_codes is None else not signed_codes
    config = DiscoverConfig(
        model=model, data=data, out=out, adapter=adapter, revision=revision, work=work, name=name, version=version,
        device=device, dtype=dtype, seed=seed, limit=limit, max_length=max_length, batch_tokens=batch_tokens,
        skip_bad_lines=skip_bad_lines, include_documents=not no_documents, halves=halves, force=force,
        finetune=FinetuneConfig(rank=rank, alpha=lora_alpha, epochs=epochs, learning_rate=learning_rate,
                                target_modules=tuple(names(target_modules))),
        curvature=CurvatureConfig(factor_documents=factor_documents, eigenvalue_documents=eigenvalue_documents,
                                  components=components, **settings("curvature", damping=damping)),
        whitening=WhiteningConfig(**settings("whitening", ridge=ridge)),
        dictionary=DictionaryConfig(atoms=atoms, alpha=alpha, **settings("dictionary", nonnegative=nonnegative)),
        select=SelectConfig(keep=keep, **settings("select", min_documents=min_documents)),
        steering=SteeringConfig(**settings("steering", steps=steps)),
        calibrate=CalibrateConfig(composition=composition, prompts=calibration_prompts,  # type: ignore[arg-type]
                                  continuation_tokens=continuation_tokens, coefficients=numbers(coefficients),
                                  **settings("calibrate", exponent=exponent)),
    )  # fmt: skip
    if adapter:
        refuse_given(context, ["target_modules", "rank", "lora_alpha", "epochs", "learning_rate"],
                     "they are of the fine-tune that --adapter takes the place of")  # fmt: skip
    if config.curvature.eigenvalues == "kronecker":
        refuse_given(context, ["eigenvalue_documents"], f"--recipe {recipe} takes eigenvalues from the factors")
    if config.steering.steps:
        refuse_given(context, ["exponent"], "it is of the unprojected atom; add --steps 0")
    quiet_libraries()
    if dry_run:
        if ranks > 1:
            raise ConfigError(f"a dry run plans one process, and {ranks} ranks were asked for; leave --ranks out")
        from offline.plan import describe, make_plan

        print(describe(make_plan(config, Progress(quiet=quiet)), config))
        return
    if ranks > 1:
        run_ranks(discover_share, ranks, config, quiet)
    else:
        with torchrun_ranks() as share:
            discover_share(config, quiet, share)


def discover_share(config: DiscoverConfig, quiet: bool, ranks: Ranks) -> None:
    """What one rank does of a discovery; the first reports."""
    from offline.pipeline import discover as run
    from offline.progress import Progress

    quiet_libraries()
    package = run(config, Progress(quiet=quiet or not ranks.first), ranks)
    if ranks.first:
        print(f"{package.path}: {len(package.manifest.atoms)} atoms")


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where model, package and working files go.")] = Path("demo"),
    port: Annotated[int, typer.Option(help="Port of the demo server; 0 chooses a free one.")] = 0,
) -> None:
    """Discover atoms of SmolLM2-135M on the demo corpus, serve them, and compare answers. Resumes when run again."""
    from clients.demo import run_demo

    quiet_libraries()
    run_demo(directory, port)
