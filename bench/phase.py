"""What phase "decode" costs in effect and saves in time, on the embedded engine.

    OMP_WAIT_POLICY=ACTIVE GOMP_SPINCOUNT=2000 python -m bench.phase PKG MODEL [--coefficient 2] [--prompts 24] [--json FILE]

Effect: for each named atom, the share of greedy answers to neutral prompts in which the atom's detector finds the behaviour,
unsteered and steered in both phases, and the mean KL(unsteered || steered) of the first token, which phase "decode" sees
least of. Time: seconds to the first token of mixes never seen, one after another, on prompts that share a long beginning.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from contextlib import aclosing
from pathlib import Path

from atoms.detectors import DETECTORS
from atoms.engine import GenerationRequest, Phase, SamplingParams
from atoms.machine import processor
from atoms.mix import Mix
from offline.shipped import read_neutral_prompts
from server.embedded.engine import EmbeddedEngine
from server.embedded.load import EngineOptions, load_package

PHASES: tuple[Phase, ...] = ("all", "decode")
_TOP = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("model")
    parser.add_argument("--coefficient", type=float, default=2)
    for name, default in (("prompts", 24), ("tokens", 48), ("prefix-words", 300), ("firsts", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loaded = load_package(args.package, EngineOptions(model=args.model))
    named = {card.alias: card.id for card in loaded.package.manifest.atoms if card.alias in DETECTORS}
    try:
        effects = {alias: effect(loaded.engine, args, alias, Mix.of({atom: args.coefficient}))
                   for alias, atom in named.items()}  # fmt: skip
        firsts = first_tokens(loaded.engine, args, [card.id for card in loaded.package.manifest.atoms])
    finally:
        loaded.engine.close()
    print(f"{processor()}; {args.prompts} neutral prompts, coefficient {args.coefficient:g}\n")
    print("| atom | unsteered | all | decode | KL first token, all | decode |\n|---|---|---|---|---|---|")
    for alias, found in effects.items():
        rates = " | ".join(f"{found['rate'][key]:.0%}" for key in ("unsteered", *PHASES))
        print(f"| {alias} | {rates} | {found['kl']['all']:.3f} | {found['kl']['decode']:.3f} |")
    print(f"\nfirst token of a new mix, {firsts['prompt_tokens']} tokens of prompt: "
          + ", ".join(f"{phase} {firsts[phase] * 1000:.0f} ms" for phase in PHASES))  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"effects": effects, "first_tokens": firsts}, indent=1) + "\n")


def effect(engine: EmbeddedEngine, args: argparse.Namespace, alias: str, mix: Mix) -> dict[str, dict[str, float]]:
    prompts = read_neutral_prompts()[: args.prompts]
    sampling = SamplingParams(max_tokens=args.tokens, temperature=0, logprobs=_TOP)
    kinds: dict[str, tuple[Mix, Phase]] = {"unsteered": (Mix(), "all"), "all": (mix, "all"), "decode": (mix, "decode")}
    rates, firsts = {}, {}
    for kind, (used, phase) in kinds.items():
        answers = engine.generate([
            GenerationRequest(str(place), engine.encode_chat([{"role": "user", "content": prompt}]), used, sampling, phase)
            for place, prompt in enumerate(prompts)
        ])  # fmt: skip
        found = [DETECTORS[alias].detect(answer.text, prompt) for answer, prompt in zip(answers, prompts, strict=True)]
        rates[kind] = sum(found) / len(found)
        firsts[kind] = [{token: logprob for token, _, _, logprob in answer.logprobs[0].top} for answer in answers]
    kl = {phase: statistics.fmean(map(kl_of_top, firsts["unsteered"], firsts[phase])) for phase in PHASES}
    return {"rate": rates, "kl": kl}


def kl_of_top(before: dict[int, float], after: dict[int, float]) -> float:
    """KL over the most likely tokens of `before`; one that `after` does not list has at most its least probability."""
    least = min(after.values())
    return sum(math.exp(logprob) * (logprob - after.get(token, least)) for token, logprob in before.items())


def first_tokens(engine: EmbeddedEngine, args: argparse.Namespace, atoms: list[str]) -> dict[str, float]:
    draw = random.Random(0)
    words = " ".join(draw.choice(("bread", "salt", "water", "flour", "oven", "time")) for _ in range(args.prefix_words))
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    prompt: tuple[int, ...] = ()
    for place in range(args.firsts + 1):
        for phase in draw.sample(PHASES, len(PHASES)):
            prompt = engine.encode_chat(
                [{"role": "system", "content": words}, {"role": "user", "content": f"Question {place}"}]
            )
            mix = Mix.of({atom: draw.uniform(-2, 2) for atom in draw.sample(atoms, 3)})
            request = GenerationRequest("r", prompt, mix, SamplingParams(max_tokens=1, temperature=0), phase)
            seconds[phase].append(asyncio.run(first_token(engine, request)))
    medians = {phase: statistics.median(values[1:]) for phase, values in seconds.items()}  # the first fills the cache
    return {"prompt_tokens": len(prompt), **medians}


async def first_token(engine: EmbeddedEngine, request: GenerationRequest) -> float:
    start = time.perf_counter()
    async with aclosing(engine.stream(request)) as deltas:
        async for _ in deltas:
            return time.perf_counter() - start
    raise SystemExit("a sequence ended without a token")


if __name__ == "__main__":
    main()
