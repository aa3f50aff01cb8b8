"""The `atomsteer` command: a thin layer of options over `offline` and `server`.

Only typer is imported here; each command imports what it needs, so `--help` answers at once. Errors that atomsteer
raises on purpose are printed without a traceback, and the exit status is 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from clients import database, experiment, preset

app = typer.Typer(
    name="atomsteer",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Finds a model's behaviours as atoms and serves any mix of them, per request, through an OpenAI-compatible API.",
)

app.add_typer(experiment.app, name="experiment")
app.add_typer(preset.app, name="preset")
app.add_typer(database.app, name="db")

PackageArgument = Annotated[Path, typer.Argument(metavar="PKG", help="Directory of a package.", show_default=False)]
PackageOption = Annotated[Path, typer.Option("--package", help="Directory of a package.", show_default=False)]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Directory or hub id of the base model; default: the one the package names."),
]
MixOption = Annotated[
    list[str] | None, typer.Option("--mix", help='Atoms with coefficients, such as "bulleted-list=2,code=-1".')
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is at the output path.")]


def main() -> None:
    """Entry point of the console script."""
    from atoms.errors import AtomsteerError

    try:
        app()
    except AtomsteerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept", file=sys.stderr)
        raise SystemExit(130) from None


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"atomsteer {installed('atomsteer')}")
        raise typer.Exit


@app.command()
def discover(
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
    seed: Annotated[int, typer.Option(help="Seed of everything random; same seed, same package.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Read at most this many documents.")] = None,
    max_length: Annotated[
        int, typer.Option(help="Longest document in tokens; longer prompts are cut on the left.")
    ] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens in one batch; bounds memory.")] = 1024,
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
            help="Added to eigenvalues, relative to their mean in the matrix; default: 0.1.", show_default=False
        ),
    ] = None,
    atoms: Annotated[
        int | None, typer.Option(help="Size of the dictionary; default: one atom per 16 documents.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="L1 penalty of the dictionary's codes.")] = 0.1,
    signed_codes: Annotated[
        bool | None,
        typer.Option("--signed-codes/--nonnegative-codes", help="Whether codes may be negative; default: no."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="default, or paper: the published pipeline's choices, for comparison.")
    ] = "default",
    keep: Annotated[int, typer.Option(help="Most atoms to calibrate and package.")] = 24,
    min_documents: Annotated[int, typer.Option(help="Fewest documents that support an atom.")] = 6,
    exponent: Annotated[
        float | None, typer.Option(help="Unprojection exponent p, -0.5 (natural step) to 0.5; default: 0.5.")
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
    force: ForceOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Find atoms of MODEL in DATA and write them as a package. Run again after a stop: it resumes."""
    from offline.config import (
        CalibrateConfig,
        CurvatureConfig,
        DictionaryConfig,
        DiscoverConfig,
        FinetuneConfig,
        SelectConfig,
        recipe_settings,
    )
    from offline.pipeline import discover as run
    from offline.progress import Progress

    def settings(part: str, **given: object) -> dict[str, Any]:
        """The recipe's settings of a part, with what was asked for by an option on top."""
        return recipe_settings(recipe, part) | {name: value for name, value in given.items() if value is not None}

    nonnegative = None if signed_codes is None else not signed_codes
    config = DiscoverConfig(
        model=model, data=data, out=out, adapter=adapter, revision=revision, work=work, name=name, version=version,
        device=device, dtype=dtype, seed=seed, limit=limit, max_length=max_length, batch_tokens=batch_tokens,
        skip_bad_lines=skip_bad_lines, include_documents=not no_documents, force=force,
        finetune=FinetuneConfig(rank=rank, alpha=lora_alpha, epochs=epochs, learning_rate=learning_rate,
                                target_modules=tuple(_split(target_modules))),
        curvature=CurvatureConfig(factor_documents=factor_documents, eigenvalue_documents=eigenvalue_documents,
                                  components=components, **settings("curvature", damping=damping)),
        dictionary=DictionaryConfig(atoms=atoms, alpha=alpha, **settings("dictionary", nonnegative=nonnegative)),
        select=SelectConfig(keep=keep, min_documents=min_documents, **settings("select")),
        calibrate=CalibrateConfig(composition=composition, prompts=calibration_prompts,  # type: ignore[arg-type]
                                  continuation_tokens=continuation_tokens, coefficients=_numbers(coefficients),
                                  **settings("calibrate", exponent=exponent)),
    )  # fmt: skip
    _quiet_libraries()
    if dry_run:
        from offline.plan import describe, make_plan

        print(describe(make_plan(config, Progress(quiet=quiet)), config))
        return
    package = run(config, Progress(quiet=quiet))
    print(f"{package.path}: {len(package.manifest.atoms)} atoms")


@app.command()
def inspect(
    package: PackageArgument,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as JSON.")] = False,
) -> None:
    """Show a package's atoms as a table. Verifies every file first."""
    from atoms.package import Package
    from clients.tables import package_table

    opened = Package.read(package)
    if as_json:
        print(opened.manifest.model_dump_json(indent=2))
        return
    from rich.console import Console

    Console().print(package_table(opened))


@app.command()
def report(
    package: PackageArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; default: report.html in the package.")
    ] = None,
    no_documents: Annotated[bool, typer.Option("--no-documents", help="Leave training text out of the page.")] = False,
) -> None:
    """Make a package's report.html again: one page with a map, a card an atom, and the run record."""
    from atoms.package import Package
    from offline.report import write_report

    print(write_report(Package.read(package), out, documents=not no_documents))


@app.command()
def label(
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
    from offline.report import write_report

    opened = Package.read(package)
    if from_detectors:
        if atom or alias or remove:
            raise typer.BadParameter("--from-detectors names all atoms; leave ID and ALIAS out")
        _quiet_libraries()
        named = label_from_detectors(opened, prompts, _numbers(coefficients), prompts_per_behaviour, max_tokens,
                                     slots=slots, model=model, device=device, dtype=dtype)  # fmt: skip
        count = sum(card.alias is not None for card in named.manifest.atoms)
        print(f"{package}: {count} of {len(named.manifest.atoms)} atoms named")
        return
    if atom is None or (alias is None) != remove:
        raise typer.BadParameter("give ID and ALIAS, ID and --remove, or --from-detectors")
    write_report(opened.relabel(atom, alias))
    print(f"{opened.card(atom).id} is now {alias or 'without an alias'}")


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
def serve(
    package: PackageOption,
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to bind; loopback unless you say otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 chooses a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help="Key for inference; repeat for more. Better: ATOMSTEER_API_KEY."),
    ] = None,
    admin_key: Annotated[
        list[str] | None, typer.Option("--admin-key", help="Admin key. Better: ATOMSTEER_ADMIN_KEY.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Model name in requests; default: the package's name.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option("--preset", help='A named mix, "name=atom=coefficient,…"; repeat for more.')
    ] = None,
    default_mix: Annotated[str | None, typer.Option(help="Mix of requests that say nothing of steering.")] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences decoded at once; default: 16, and 256 with vLLM.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens.")] = None,
    max_waiting: Annotated[int, typer.Option(help="Sequences that may wait before requests are refused.")] = 256,
    prefill_tokens_per_step: Annotated[
        int, typer.Option(help="Prompt tokens computed between two decode steps.")
    ] = 512,
    max_atoms_per_mix: Annotated[int, typer.Option(help="Most atoms in one mix.")] = 32,
    max_n: Annotated[int, typer.Option(help="Largest n of a request.")] = 16,
    max_sequences: Annotated[int, typer.Option(help="Most sequences of a request: prompts times n.")] = 64,
    max_messages: Annotated[int, typer.Option(help="Most messages in one chat.")] = 1024,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body in bytes.")] = 1 << 20,
    max_stop: Annotated[int, typer.Option(help="Most stop strings of a request.")] = 16,
    max_stop_bytes: Annotated[int, typer.Option(help="Longest stop string in bytes.")] = 1024,
    max_logprobs: Annotated[int, typer.Option(help="Most log-probabilities a token.")] = 20,
    max_logit_bias: Annotated[int, typer.Option(help="Most entries of logit_bias.")] = 1024,
    no_training_text: Annotated[
        bool, typer.Option("--no-training-text", help="Hide training documents from admin keys too.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="Web origin that browsers may call from.")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            help="URL of SQLite or PostgreSQL for presets and experiments, or none; default: a SQLite file of "
            "the user's. Also ATOMSTEER_DATABASE."
        ),
    ] = None,
    shutdown_timeout: Annotated[float, typer.Option(help="Seconds that requests in flight get after SIGTERM.")] = 30.0,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="One line a request, never a prompt.")
    ] = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: Annotated[
        str, typer.Option(help="transformers (the embedded server), or vllm where that is installed.")
    ] = "transformers",
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM OPTIONS]", help="With --engine vllm: options of `vllm serve`."),
    ] = None,
) -> None:
    """Serve a package through an OpenAI-compatible API, on transformers or inside vLLM."""
    import os

    from server.config import ServeConfig
    from server.limits import Limits

    if engine not in ("transformers", "vllm"):
        raise typer.BadParameter(f"{engine!r} is not transformers or vllm", param_hint="--engine")
    if vllm_options and engine != "vllm":
        raise typer.BadParameter(f"{vllm_options[0]!r} is an option of vLLM; add --engine vllm")
    config = ServeConfig(
        package=package, model=model, host=host, port=port, api_keys=tuple(api_key or ()), admin_keys=tuple(admin_key or ()),
        served_model_name=served_model_name, presets=tuple(preset or ()), default_mix=default_mix,
        slots=max_num_seqs if max_num_seqs is not None else 256 if engine == "vllm" else 16,
        max_model_len=max_model_len, max_waiting=max_waiting, prefill_tokens_per_step=prefill_tokens_per_step,
        cors_origins=tuple(cors_origin or ()), shutdown_timeout=shutdown_timeout, access_log=access_log, device=device,
        dtype=dtype, allow_training_text=not no_training_text, database=database,
        limits=Limits(max_atoms_per_mix=max_atoms_per_mix, max_n=max_n, max_sequences=max_sequences,
                      max_messages=max_messages, max_body_bytes=max_body_bytes, max_stop=max_stop,
                      max_stop_bytes=max_stop_bytes, max_logprobs=max_logprobs, max_logit_bias=max_logit_bias),
    ).with_environment(os.environ)  # fmt: skip
    if engine == "vllm":
        from server.vllm.serve import serve as serve_in_vllm

        serve_in_vllm(config, vllm_options or [])
    _quiet_libraries()
    from server.embedded.serve import serve as run

    run(config)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message.")],
    package: PackageOption,
    mix: MixOption = None,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    allow_out_of_range: Annotated[
        bool, typer.Option("--allow-out-of-range", help="Allow coefficients beyond an atom's tested range.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Stream one answer under a mix, without a server."""
    from clients.generate import stream_answer

    _quiet_libraries()
    stream_answer(package, mix or [], prompt, system=system, model=model, max_tokens=max_tokens, temperature=temperature,
                  seed=seed, allow_out_of_range=allow_out_of_range, device=device, dtype=dtype)  # fmt: skip


@app.command()
def batch(
    requests: Annotated[
        Path, typer.Argument(metavar="IN", help="OpenAI batch file or prompts: JSONL, CSV, Parquet, text.")
    ],
    out: Annotated[Path, typer.Option("--out", help="JSONL to write, or to go on with.")],
    package: Annotated[Path | None, typer.Option("--package", help="Package to run in this process.")] = None,
    server: Annotated[str | None, typer.Option("--server", help="URL of a running server instead.")] = None,
    key: Annotated[str | None, typer.Option("--key", envvar="ATOMSTEER_API_KEY", help="Key of the server.")] = None,
    mix: MixOption = None,
    column: Annotated[str | None, typer.Option(help="Column of prompts; default: prompt.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before plain prompts.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, where a line says nothing.")] = 256,
    temperature: Annotated[float, typer.Option(help="Where a line says nothing; 0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling, where a line says nothing.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="With --package: sequences decoded at once.")] = 16,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight; default: twice the slots, or 32 with --server.")
    ] = None,
    max_retries: Annotated[
        int, typer.Option(min=0, help="Tries after the first one, on 429, 5xx and no connection.")
    ] = 10,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Drop lines that failed from OUT first, and answer them again.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count and predict KL; load no model, write nothing.")
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Answer every line of a file under mixes. Run again after a stop: it resumes. Status 1 if lines failed."""
    if not dry_run and server is None:
        _quiet_libraries()
    from atoms.mix import parse_mix
    from clients.batch import BatchConfig, print_dry_run, run_batch
    from clients.batch_lines import Defaults
    from server.embedded.load import EngineOptions

    body = {"max_tokens": max_tokens, "temperature": temperature} | ({"seed": seed} if seed is not None else {})
    config = BatchConfig(
        input=requests, out=out, defaults=Defaults(body, {"atoms": parse_mix(mix)} if mix else None, column, system),
        concurrency=concurrency or (32 if server else 2 * slots), max_retries=max_retries, retry_failed=retry_failed,
        quiet=quiet,
    )  # fmt: skip
    if dry_run:
        return print_dry_run(config, package=package, server=server, key=key)
    options = EngineOptions(model=model, device=device, dtype=dtype, slots=slots)
    outcome = run_batch(config, package=package, server=server, key=key, options=options)
    rate = f", {outcome.tokens / outcome.seconds:.1f} tok/s" if outcome.seconds else ""
    print(f"{out}: {outcome.done} lines answered, {outcome.failed} of them failed{rate}")
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def chat(
    package: Annotated[Path | None, typer.Option("--package", help="Package to run in this process.")] = None,
    server: Annotated[str | None, typer.Option("--server", help="URL of a running server instead.")] = None,
    key: Annotated[str | None, typer.Option("--key", envvar="ATOMSTEER_API_KEY", help="Key of the server.")] = None,
    mix: MixOption = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Talk in the terminal; /mix, /atoms, /compare and /reset between turns."""
    if server is None:
        _quiet_libraries()
    from clients.chat import run_chat
    from server.embedded.load import EngineOptions

    sampling = {"max_tokens": max_tokens, "temperature": temperature} | ({"seed": seed} if seed is not None else {})
    run_chat(package=package, server=server, key=key, mix=mix or [], system=system, sampling=sampling,
             options=EngineOptions(model=model, device=device, dtype=dtype, slots=2))  # fmt: skip


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
    batch_tokens: Annotated[int, typer.Option(min=64, help="Padded tokens in one batch; bounds memory.")] = 1024,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Show which atoms new documents are made of, the training documents behind them, and what is unexplained."""
    _quiet_libraries()
    from clients.attribute import given_documents, print_attributions

    documents = given_documents(text, prompt, system, messages, data)
    print_attributions(package, documents, model=model, device=device, dtype=dtype, max_length=max_length,
                       batch_tokens=batch_tokens, top=top, examples=examples, as_json=as_json)  # fmt: skip


@app.command()
def evaluate(
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
    screen_prompts: Annotated[int, typer.Option(help="Development prompts on which candidates are found.")] = 6,
    dev_prompts: Annotated[int | None, typer.Option(help="Development prompts a goal; default: all.")] = None,
    heldout_prompts: Annotated[int | None, typer.Option(help="Held-out prompts a goal; default: all.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 48,
    kl_prompts: Annotated[int, typer.Option(help="Prompts along whose answers KL is measured.")] = 24,
    random_controls: Annotated[int, typer.Option(help="Random directions of equal KL a goal.")] = 1,
    data: Annotated[
        Path | None, typer.Option(help="Labelled documents: adds the supervised control. Needs a backward pass.")
    ] = None,
    label_field: Annotated[str, typer.Option(help="Field of the documents that holds the label.")] = "task",
    label: Annotated[
        list[str] | None, typer.Option("--label", help="BEHAVIOUR=LABEL where the two differ; repeat for more.")
    ] = None,
    supervised_documents: Annotated[int, typer.Option(help="Labelled documents a behaviour.")] = 64,
    no_curve: Annotated[
        bool, typer.Option("--no-curve", help="Leave the other coefficients out of the held-out prompts.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Results and kept answers; default: PKG.evaluation.")
    ] = None,
    write_cards: Annotated[
        bool, typer.Option("--write-cards", help="Write the held-out effects into the package's cards.")
    ] = False,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="No figures; matplotlib is not needed then.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the controls.")] = 0,
    slots: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 32,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure atoms on held-out prompts against controls of equal KL. Run again after a stop: it resumes."""
    _quiet_libraries()
    from clients.evaluate import Labelled, parse_labels, run_evaluate
    from offline.evaluation.config import EvaluateConfig
    from server.embedded.load import EngineOptions

    config = EvaluateConfig(
        behaviours=tuple(_split(behaviours)), wanted=tuple(_split(goals)), atoms=tuple(_split(atoms)),  # type: ignore[arg-type]
        coefficients=_numbers(coefficients), screen_prompts=screen_prompts, candidates=candidates, dev_prompts=dev_prompts,
        heldout_prompts=heldout_prompts, max_kl=max_kl, max_degenerate=max_degenerate, kl_prompts=kl_prompts,
        random_controls=random_controls, curve=not no_curve, seed=seed,
    )  # fmt: skip
    labelled = Labelled(data, label_field, parse_labels(label or []), supervised_documents) if data else None
    if label and not data:
        raise typer.BadParameter("--label names labels of --data; give that too")
    run_evaluate(
        package, config, prompts=prompts, out=out, max_tokens=max_tokens, labelled=labelled, write_cards=write_cards,
        plots=not no_plots, quiet=quiet,
        options=EngineOptions(model=model, device=device, dtype=dtype, slots=slots),
    )  # fmt: skip


@app.command()
def sweep(
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
    kl_prompts: Annotated[int, typer.Option(min=1, help="Prompts along whose answers KL is measured.")] = 24,
    allow_out_of_range: Annotated[
        bool, typer.Option("--allow-out-of-range", help="Allow coefficients beyond an atom's tested range.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Results and kept answers; default: PKG.sweep.")] = None,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="No figures; matplotlib is not needed then.")] = False,
    slots: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 32,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Answer prompts under many mixes and measure each: detectors, length, KL, perplexity. Resumes after a stop."""
    _quiet_libraries()
    from clients.sweep import run_sweep, sweep_prompts
    from server.embedded.load import EngineOptions

    run_sweep(
        package, atoms=_split(atoms), coefficients=_numbers(coefficients), combine=combine, mixes=mix or [],
        prompts=sweep_prompts(prompts, texts, _split(behaviours), kind, split, limit), detectors=_split(detectors),
        max_tokens=max_tokens, kl_prompts=kl_prompts, out=out, allow_out_of_range=allow_out_of_range,
        plots=not no_plots, quiet=quiet,
        options=EngineOptions(model=model, device=device, dtype=dtype, slots=slots),
    )  # fmt: skip


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where model, package and working files go.")] = Path("demo"),
    port: Annotated[int, typer.Option(help="Port of the demo server; 0 chooses a free one.")] = 0,
) -> None:
    """Discover atoms of SmolLM2-135M on the demo corpus, serve them, and compare answers. Resumes when run again."""
    from clients.demo import run_demo

    _quiet_libraries()
    run_demo(directory, port)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> tuple[float, ...]:
    convert: Callable[[str], float] = float
    try:
        return tuple(convert(part) for part in _split(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as -2,2") from error


def _quiet_libraries() -> None:
    """Keeps transformers' own bars and notices out of our output; errors still raise."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
