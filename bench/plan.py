"""The dry run against a real run: planned and taken seconds of every stage, and their ratio.

    python -m bench.plan [--limit N] [--model DIR] [--data FILE] [--dir DIR] [--cpu] [--json FILE]

Plans and then runs a discovery with the demo's settings on the first `--limit` documents (default: all) of the demo corpus,
in a temporary directory or in `--dir` (`make demo DEMO=DIR` goes on with what lies there). A plan holds for the machine as
the probe found it, so load it with nothing else meanwhile, or compare CPU seconds of all threads (--cpu) in place of wall
time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from clients.demo import demo_config
from offline.config import DiscoverConfig
from offline.demo_model import prepare_demo_model
from offline.pipeline import discover
from offline.plan import describe, make_plan
from offline.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--dir", type=Path, help="where the discovery is made and kept; nothing may lie there yet")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu:
        count_cpu_seconds()
    model = options.model or prepare_demo_model(Path(".cache/models"))
    if options.dir and any((options.dir / part).exists() for part in ("package", "work")):
        parser.error(f"{options.dir} has a discovery already; give another --dir")
    with nullcontext(options.dir) if options.dir else tempfile.TemporaryDirectory() as folder:
        config = replace(demo_config(Path(folder), model.resolve()), limit=options.limit)
        if options.data:
            config = replace(config, data=options.data)
        if options.limit:  # so few documents make small atoms
            config = replace(
                config, select=replace(config.select, keep=4, min_documents=2, min_z=-1e6, min_stability=0.0)
            )
        plan = make_plan(config, Progress(quiet=True))
        print(describe(plan, config))
        with ProcessPoolExecutor(1, get_context("spawn")) as own:  # so that its memory holds nothing of the probe's
            taken = own.submit(run, config, options.cpu).result()
    planned = {stage.name: stage.seconds for stage in plan.stages}
    result = {
        "machine": plan.machine,
        "seconds": "CPU" if options.cpu else "wall",
        "documents": plan.documents,
        "probe_seconds": round(plan.probe_seconds, 1),
        "stages": {name: {"planned": round(planned[name], 2), "taken": cost["seconds"],
                          "ratio": round(planned[name] / max(cost["seconds"], 0.01), 2)} for name, cost in taken.items()},
        "peak_mib": {"planned": plan.memory // 2**20, "taken": max(cost["peak_mib"] for cost in taken.values())},
    }  # fmt: skip
    both = [sum(stage[kind] for stage in result["stages"].values()) for kind in ("planned", "taken")]
    print(f"\n{'stage':<14}{'planned s':>11}{'taken s':>10}{'ratio':>7}")
    for name, stage in result["stages"].items():
        print(f"{name:<14}{stage['planned']:>11.1f}{stage['taken']:>10.1f}{stage['ratio']:>7.2f}")
    print(f"{'in all':<14}{both[0]:>11.1f}{both[1]:>10.1f}{both[0] / both[1]:>7.2f}")
    print(f"peak MiB: planned {result['peak_mib']['planned']}, taken {result['peak_mib']['taken']}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def run(config: DiscoverConfig, cpu: bool) -> dict[str, dict[str, float]]:
    """A discovery's stages with seconds and peak memory."""
    if cpu:
        count_cpu_seconds()
    return discover(config, Progress()).manifest.record["timings"]


def count_cpu_seconds() -> None:
    time.monotonic = time.process_time  # what plan and progress both measure with


if __name__ == "__main__":
    main()
