"""`serve`: a package behind an OpenAI-compatible API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clients.options import DeviceOption, DtypeOption, ModelOption, PackageOption, quiet_libraries

app = typer.Typer()


@app.command()
def serve(
    package: PackageOption,
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to bind; loopback unless you say otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help="Key for inference; repeat for more. Better: ATOMSTEER_API_KEY."),
    ] = None,
    admin_key: Annotated[
        list[str] | None, typer.Option("--admin-key", help="Admin key. Better: ATOMSTEER_ADMIN_KEY.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File of hashed keys for inference (`atomsteer keys`); read again when it changes."),
    ] = None,
    admin_key_file: Annotated[Path | None, typer.Option(help="The same for admin keys.")] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Generation requests a minute of each key; default: no limit.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Prompt and generated tokens a minute of each key; default: no limit.")
    ] = None,
    max_concurrent_requests: Annotated[
        int | None, typer.Option(min=1, help="Generation requests of each key at once; default: no limit.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Model name in requests; default: the package's name.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option("--preset", help='A named mix, "name=atom=coefficient,…"; repeat for more.')
    ] = None,
    default_mix: Annotated[str | None, typer.Option(help="Mix of requests that say nothing of steering.")] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Sequences decoded at once; default: 16, and 256 with vLLM.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Context in tokens.")] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Sequences that may wait before requests are refused.")] = 256,
    prefill_tokens_per_step: Annotated[
        int, typer.Option(min=1, help="Prompt tokens read in a step; a quarter of them while answers run.")
    ] = 512,
    prefix_cache_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of prompts kept for others that begin alike; 0: none.")
    ] = 4096,
    max_atoms_per_mix: Annotated[int, typer.Option(min=1, help="Most atoms in one mix.")] = 32,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; default: what the context holds.")
    ] = None,
    max_n: Annotated[int, typer.Option(min=1, help="Largest n of a request.")] = 16,
    max_sequences: Annotated[int, typer.Option(min=1, help="Most sequences of a request: prompts times n.")] = 64,
    max_messages: Annotated[int, typer.Option(min=1, help="Most messages in one chat.")] = 1024,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Largest request body in bytes.")] = 1 << 20,
    body_timeout: Annotated[float, typer.Option(help="Seconds within which a body must have arrived.")] = 30.0,
    max_stop: Annotated[int, typer.Option(min=1, help="Most stop strings of a request.")] = 16,
    max_stop_bytes: Annotated[int, typer.Option(min=1, help="Longest stop string in bytes.")] = 1024,
    max_logprobs: Annotated[int, typer.Option(min=1, help="Most log-probabilities a token.")] = 20,
    max_logit_bias: Annotated[int, typer.Option(min=1, help="Most entries of logit_bias.")] = 1024,
    max_grammar_bytes: Annotated[
        int, typer.Option(min=1, help="Longest JSON schema, regular expression or list of choices in bytes.")
    ] = 1 << 16,
    max_tools: Annotated[int, typer.Option(min=1, help="Most tools of a request.")] = 128,
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
    measured_kl_share: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of each arm's responses whose KL is measured in the background; 0: none."
        ),
    ] = 0.01,
    measured_kl_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens a minute that measuring may read: twice prompt and answer.")
    ] = 20_000,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that requests in flight get after SIGTERM.")
    ] = 30.0,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="One line a request, without the prompt.")
    ] = True,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="The prompt too in the line of a request.")
    ] = False,
    log_format: Annotated[str, typer.Option(help="text, or json for one JSON object a line.")] = "text",
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
    from server.limits import DriftBudget, Limits, Quota

    if engine not in ("transformers", "vllm"):
        raise typer.BadParameter(f"{engine!r} is not transformers or vllm", param_hint="--engine")
    if vllm_options and engine != "vllm":
        raise typer.BadParameter(f"{vllm_options[0]!r} is an option of vLLM; add --engine vllm")
    config = ServeConfig(
        package=package, model=model, host=host, port=port, api_keys=tuple(api_key or ()), admin_keys=tuple(admin_key or ()),
        api_key_file=api_key_file, admin_key_file=admin_key_file,
        quota=Quota(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute,
                    max_concurrent_requests=max_concurrent_requests),
        log_prompts=log_prompts, log_format=log_format, body_timeout=body_timeout,
        served_model_name=served_model_name, presets=tuple(preset or ()), default_mix=default_mix,
        slots=max_num_seqs if max_num_seqs is not None else 256 if engine == "vllm" else 16,
        max_model_len=max_model_len, max_waiting=max_waiting, prefill_tokens_per_step=prefill_tokens_per_step,
        prefix_cache_tokens=prefix_cache_tokens,
        cors_origins=tuple(cors_origin or ()), shutdown_timeout=shutdown_timeout, access_log=access_log, device=device,
        dtype=dtype, allow_training_text=not no_training_text, database=database,
        drift=DriftBudget(share=measured_kl_share, tokens_per_minute=measured_kl_tokens),
        limits=Limits(max_atoms_per_mix=max_atoms_per_mix, max_tokens=max_tokens, max_n=max_n, max_sequences=max_sequences,
                      max_messages=max_messages, max_body_bytes=max_body_bytes, max_stop=max_stop,
                      max_stop_bytes=max_stop_bytes, max_logprobs=max_logprobs, max_logit_bias=max_logit_bias,
                      max_grammar_bytes=max_grammar_bytes, max_tools=max_tools),
    ).with_environment(os.environ)  # fmt: skip
    if engine == "vllm":
        from server.vllm.serve import serve as serve_in_vllm

        serve_in_vllm(config, vllm_options or [])
    quiet_libraries()
    from server.embedded.serve import serve as run

    run(config)
