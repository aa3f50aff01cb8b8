"""How long the embedded server takes from its command to /ready, and the command from its start to its help.

    python -m bench.start PKG MODEL [--runs 5]

`MODEL` is a directory or a model that is in the cache; the first start of each row is left out, as it reads files that may
not be in memory yet.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import httpx

from atoms.machine import processor

COMMAND = [sys.executable, "-m", "clients.cli"]
HELPS = ([], ["discover"], ["serve"], ["generate"], ["evaluate"], ["experiment"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    print(f"{processor()}\n\n| started | seconds: median | longest | runs |\n|---|---|---|---|")
    for dtype in ("auto", "float32"):
        options = ["serve", "--port", "0", "--package", args.package, "--model", args.model, "--dtype", dtype,
                   "--database", "none"]  # fmt: skip
        report(f"`serve --dtype {dtype}` to /ready", partial(until_ready, options), args.runs)
    for words in HELPS:
        asked = [*words, "--help"]
        report(f"`atomsteer {' '.join(asked)}`", partial(until_ended, asked), args.runs)


def report(name: str, measure: Callable[[], float], runs: int) -> None:
    measure()
    seconds = [measure() for _ in range(runs)]
    print(f"| {name} | {statistics.median(seconds):.2f} | {max(seconds):.2f} | {runs} |", flush=True)


def until_ready(options: list[str]) -> float:
    """Seconds. Raises RuntimeError if the server ends before it is ready."""
    begun = time.perf_counter()
    with subprocess.Popen(
        [*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = next(
                (found[1] for line in process.stdout if (found := re.search(r"serves .* on (http://\S+)", line))), None
            )
            if url is None:
                raise RuntimeError(f"the server did not start: {' '.join(options)}")
            while httpx.get(f"{url}/ready").status_code != 200:
                time.sleep(0.01)
            return time.perf_counter() - begun
        finally:
            process.terminate()


def until_ended(options: list[str]) -> float:
    """Seconds. Raises CalledProcessError if the command fails."""
    begun = time.perf_counter()
    subprocess.run([*COMMAND, *options], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
