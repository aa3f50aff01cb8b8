"""What a long prompt does to an answer that is running, on the embedded engine: milliseconds between its tokens.

    OMP_WAIT_POLICY=ACTIVE GOMP_SPINCOUNT=2000 python -m bench.long_prompt MODEL [--prompt 4000] [--chunks 512 2048 32768]

A chunk is `prefill_tokens_per_step`; a quarter of it is read between two tokens of a running answer. The largest one shows
a prompt that is read at once. Each chunk has an engine of its own on the same model.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from contextlib import aclosing
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from atoms.engine import GenerationRequest, SamplingParams
from atoms.machine import processor
from atoms.model import choose_device, choose_dtype
from atoms.steered import PackedBank
from bench.embedded_decode import random_bank
from server.embedded.attention import group_heads
from server.embedded.engine import EmbeddedEngine
from server.embedded.packing import pack_linears


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 2048, 32768])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = choose_device()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=choose_dtype(device)).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    bank = random_bank(model, 8)
    compose = PackedBank(bank, "linear", device, model.dtype).compose
    pack_linears(model)
    group_heads(model)
    found = {}
    print(f"{processor()}; a prompt of {args.prompt} tokens joins a running answer\n")
    print(
        "| tokens a step | between tokens before | while it is read: median | longest | read after |\n|---|---|---|---|---|"
    )
    for chunk in args.chunks:
        engine = EmbeddedEngine(model, tokenizer, bank.base.space, compose, slots=4, max_model_len=args.prompt + 100,
                                prefill_tokens_per_step=chunk)  # fmt: skip
        try:
            before, during, seconds = asyncio.run(gaps(engine, args.prompt))
        finally:
            engine.close()
        found[chunk] = {"before": before, "during": during, "seconds": seconds}
        print(f"| {chunk} | {statistics.median(before) * 1000:.0f} ms | {statistics.median(during) * 1000:.0f} ms | "
              f"{max(during) * 1000:.0f} ms | {seconds:.1f} s |", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


async def gaps(engine: EmbeddedEngine, length: int) -> tuple[list[float], list[float], float]:
    """Seconds between the tokens of an answer before and while a prompt of `length` tokens is read, and that reading's."""
    running = GenerationRequest("running", engine.encode_text("Tell me a story."),
                                sampling=SamplingParams(max_tokens=length, temperature=0, ignore_eos=True))  # fmt: skip
    words = engine.encode_text("A loaf of bread needs flour, water, salt and time. " * (length // 8))[:length]
    times: list[float] = []
    joined = finished = 0.0

    async def read_long() -> None:
        nonlocal joined, finished
        joined = time.perf_counter()
        async with aclosing(
            engine.stream(GenerationRequest("long", words, sampling=SamplingParams(max_tokens=1)))
        ) as deltas:
            async for _ in deltas:
                finished = time.perf_counter()

    async with aclosing(engine.stream(running)) as deltas:
        task = None
        async for _ in deltas:
            times.append(time.perf_counter())
            if len(times) == 30:
                task = asyncio.create_task(read_long())
            if finished and times[-1] > finished:
                break
        assert task is not None
        await task
    pairs = list(itertools.pairwise(times))
    before = [b - a for a, b in pairs if b <= joined]
    during = [b - a for a, b in pairs if b > joined and a < finished]
    return before[5:], during, finished - joined


if __name__ == "__main__":
    main()
