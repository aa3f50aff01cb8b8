"""`serve`: a package behind an OpenAI-compatible API."""

from __future__ import annotations

from typing import Annotated

import typer

from clients.options import DeviceOption, DtypeOption, ModelOption, PackageOption, quiet_libraries

app = typer.Typer()


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
    quiet_libraries()
    from server.embedded.serve import serve as run

    run(config)
