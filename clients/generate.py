"""`generate`: one answer from a package in this process, streamed to the terminal."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from atoms.engine import Engine, GenerationRequest, SamplingParams
from atoms.mix import mix_text, parse_mix
from atoms.package import Package
from server.embedded.load import EngineOptions, load_package


def stream_answer(
    path: Path,
    mix_texts: Sequence[str],
    prompt: str,
    *,
    system: str | None,
    sampling: SamplingParams,
    allow_out_of_range: bool,
    options: EngineOptions,
) -> None:
    """Prints the answer as it comes on standard output, and the resolved mix on standard error.

    Raises MixError and its kin before the model is loaded.
    """
    package = Package.read(path)
    mix = package.mix(parse_mix(list(mix_texts)))
    if not allow_out_of_range:
        package.check_range(mix)
    described = mix_text({package.card(atom).name: value for atom, value in mix}, ", ")
    print(f"[{described}; predicted KL {package.predicted_kl(mix):.3f} nats a token]", file=sys.stderr)
    messages: list[dict[str, object]] = [{"role": "system", "content": system}] if system else []
    engine = load_package(path, options).engine
    try:
        ids = engine.encode_chat([*messages, {"role": "user", "content": prompt}])
        asyncio.run(_print_stream(engine, GenerationRequest("generate", ids, mix, sampling)))
    finally:
        engine.close()


async def _print_stream(engine: Engine, request: GenerationRequest) -> None:
    async for delta in engine.stream(request):
        print(delta.text, end="", flush=True)
    print()
