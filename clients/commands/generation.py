"""Answers under mixes: generate, chat, batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.options import (
    DeviceOption,
    DtypeOption,
    MixOption,
    ModelOption,
    PackageOption,
    quiet_libraries,
    refuse_given,
)

if TYPE_CHECKING:
    from server.embedded.load import EngineOptions

app = typer.Typer()


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message.")],
    package: PackageOption,
    mix: MixOption = None,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    allow_out_of_range: Annotated[
        bool, typer.Option("--allow-out-of-range", help="Allow coefficients beyond an atom's tested range.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Stream one answer under a mix, without a server."""
    quiet_libraries()
    from atoms.engine import SamplingParams
    from clients.generate import stream_answer
    from server.embedded.load import EngineOptions

    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    options = EngineOptions(model=model, device=device, dtype=dtype, slots=1)
    stream_answer(package, mix or [], prompt, system=system, sampling=sampling, allow_out_of_range=allow_out_of_range,
                  options=options)  # fmt: skip


@app.command()
def chat(
    context: typer.Context,
    package: Annotated[Path | None, typer.Option("--package", help="Package to run in this process.")] = None,
    server: Annotated[str | None, typer.Option("--server", help="URL of a running server instead.")] = None,
    key: Annotated[str | None, typer.Option("--key", envvar="ATOMSTEER_API_KEY", help="Key of the server.")] = None,
    mix: MixOption = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Talk in the terminal; /mix, /atoms, /compare and /reset between turns. Piped: status 1 if a turn failed."""
    from clients.chat import run_chat

    if server is None:
        refuse_given(context, ["key"], "it is of --server")
    sampling = {"max_tokens": max_tokens, "temperature": temperature} | ({"seed": seed} if seed is not None else {})
    failed = run_chat(package=package, server=server, key=key, mix=mix or [], system=system, sampling=sampling,
                      options=_engine_options(server, model, device, dtype, 2))  # fmt: skip
    if failed and not sys.stdin.isatty():  # at a terminal somebody has read why
        raise typer.Exit(1)


@app.command()
def batch(
    context: typer.Context,
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
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Where a line says nothing; 0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling, where a line says nothing.")] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="With --package: sequences decoded at once; default: 16.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight; default: twice the slots, or 32 with --server.")
    ] = None,
    max_retries: Annotated[
        int, typer.Option(min=0, help="Tries after the first one, on 408, 425, 429, 5xx but 501, and no connection.")
    ] = 10,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="With --server: seconds to wait for an answer; default: 600.")
    ] = None,
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
    """Answer every line of a file under mixes. Run again after a stop: it resumes. Status 1 if lines of OUT have failed."""
    from atoms.mix import parse_mix
    from clients.batch import BatchConfig, run_batch
    from clients.batch_lines import Defaults

    if server is not None and slots is not None:
        raise typer.BadParameter("--slots is for --package; the server has its own")
    if server is None:
        refuse_given(context, ["timeout", "key"], "they are of --server; the engine in this process is waited for")
    if requests.suffix.lower() == ".txt":
        refuse_given(context, ["column"], f"{requests} is text, a prompt a line")
    slots = slots or 16
    body = {"max_tokens": max_tokens, "temperature": temperature} | ({"seed": seed} if seed is not None else {})
    config = BatchConfig(
        input=requests, out=out, defaults=Defaults(body, {"atoms": parse_mix(mix)} if mix else None, column, system),
        concurrency=concurrency or (32 if server else 2 * slots), max_retries=max_retries, retry_failed=retry_failed,
        timeout=(timeout or 600.0) if server else None, quiet=quiet,
    )  # fmt: skip
    if dry_run:
        from clients.batch_dry_run import print_dry_run

        return print_dry_run(config, package=package, server=server, key=key)
    options = _engine_options(server, model, device, dtype, slots)
    outcome = run_batch(config, package=package, server=server, key=key, options=options)
    rate = f", {outcome.tokens / outcome.seconds:.1f} tok/s" if outcome.seconds else ""
    print(f"{out}: {outcome.done} lines answered, {outcome.failed} of them failed{rate}")
    if outcome.failed_before:
        print(f"{out}: {outcome.failed_before} lines of earlier runs have failed; --retry-failed answers them again")
    if outcome.failed or outcome.failed_before:
        raise typer.Exit(1)


def _engine_options(server: str | None, model: str | None, device: str, dtype: str, slots: int) -> EngineOptions | None:
    """How to load a model in this process; None for a server, which needs no torch here. Raises typer.BadParameter."""
    if server is not None:
        if (model, device, dtype) != (None, "auto", "auto"):
            raise typer.BadParameter("--model, --device and --dtype are for --package; the server has its own")
        return None
    quiet_libraries()
    from server.embedded.load import EngineOptions

    return EngineOptions(model=model, device=device, dtype=dtype, slots=slots)
