"""Simulated users under a real experiment: real generations through the API, and an opinion on each.

    python -m bench.ab_demo EXPERIMENT [--units 600] [--first 0] [--server http://127.0.0.1:8000]

Unit n asks one question and finds the answer helpful with probability 0.8 if it is a numbered list and 0.3 if not: a taste
that the experiment ought to find. Run it again with another --first to look in between.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time

from openai import AsyncOpenAI

from atoms.detectors import get_detector

TASKS = (
    "make tea", "plant a tree", "clean a bicycle chain", "write a letter", "bake bread", "change a tyre", "learn to swim",
    "paint a wall", "cook rice", "tie a tie", "pack a suitcase", "wash a car", "start a blog", "train a puppy", "fix a leak",
    "grow tomatoes", "save money", "read a map", "take a photo", "sew a button",
)  # fmt: skip


async def simulate(client: AsyncOpenAI, model: str, experiment: str, unit: int, tokens: int) -> None:
    rng = random.Random(unit)
    prompt = f"How do I {TASKS[unit % len(TASKS)]}?"
    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        seed=unit,
        user=f"user-{unit}",
        extra_body={"steering": {"experiment": experiment}},
    )
    listed = get_detector("numbered-list").detect(answer.choices[0].message.content or "", prompt)
    helpful = rng.random() < (0.8 if listed else 0.3)
    outcome = {"response_id": answer.id, "metric": "helpful", "value": float(helpful)}
    await client.post(f"/experiments/{experiment}/outcomes", body=outcome, cast_to=object)


async def run(args: argparse.Namespace) -> None:
    units = iter(range(args.first, args.first + args.units))
    async with AsyncOpenAI(base_url=f"{args.server}/v1", api_key=os.environ.get("ATOMSTEER_API_KEY", "none")) as client:
        model = (await client.models.list()).data[0].id

        async def work() -> None:
            for unit in units:
                await simulate(client, model, args.experiment, unit, args.tokens)

        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(args.concurrency)))
    print(f"{args.units} units in {time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    for name, default in (("units", 600), ("first", 0), ("tokens", 48), ("concurrency", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
