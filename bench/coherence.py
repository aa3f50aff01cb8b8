"""The best atoms of a package, with the task labels of their top documents.

    python -m bench.coherence --package demo/package --data offline/data/demo_documents.jsonl [--count 20]

Labels (`task` of each row, matched by `id`) are read here for scoring only; discovery never reads them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from atoms.package import Package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20)
    options = parser.parse_args()
    package = Package.read(options.package)
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    tasks = {row["id"]: row["task"] for row in rows}
    top = {line["atom"]: [tasks[d["id"]] for d in line["documents"]] for line in package.evidence()}
    print(f"{'atom':<16}{'raw':>6}{'z':>6}{'white':>7}{'stab':>6}{'docs':>6}  labels of the top documents")
    for card in sorted(package.manifest.atoms, key=lambda c: -c.coherence.raw)[: options.count]:
        labels = ", ".join(f"{task} {count}" for task, count in Counter(top[card.id]).most_common(3))
        coherence = card.coherence
        print(f"{card.name:<16}{coherence.raw:>6.3f}{coherence.raw_z:>6.1f}{coherence.whitened:>7.3f}"
              f"{card.stability or 0:>6.2f}{card.n_documents:>6}  {labels} of {len(top[card.id])}")  # fmt: skip
    best: dict[str, float] = {}
    for labels in top.values():
        if len(labels) >= 8:
            task, count = Counter(labels).most_common(1)[0]
            best[task] = max(best.get(task, 0.0), count / len(labels))
    for limit in (0.8, 0.6):
        count = sum(share >= limit for share in best.values())
        types = len(set(tasks.values()))
        print(f"{count} of {types} types have an atom with >= {limit:.0%} of its top documents (>= 8) of the type")


if __name__ == "__main__":
    main()
