"""The default recipe beside the published pipeline's, on the same gradients, at the same dictionary size.

    python bench/recipes.py --model DIR --adapter demo/package/base --data offline/data/demo_documents.jsonl --work DIR

Both start from one adapter and see the same documents; only the settings of `offline.config.RECIPES` differ. Our scorer
judges both: an atom's top 20 documents by |code|, sign-aligned raw coherence, near-duplicates (|cos| > 0.8) of better
atoms removed. Half-split stability: dictionaries of two random halves of the documents, matched one to one. Task labels
(`task` of each row) are read here for scoring only. Existing stages in --work are reused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path

import torch

from offline.config import RECIPES, CurvatureConfig, DiscoverConfig, SelectConfig, recipe_settings
from offline.dictionary import encode, learn_dictionary
from offline.pipeline import Run
from offline.progress import Progress
from offline.rows import RowStore
from offline.select import Candidate, candidates, select, stability

COHERENT = 0.1
MATCHED = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--atoms", type=int, nargs="+", default=[34, 60], help="dictionary sizes")
    parser.add_argument("--factor-documents", type=int, default=96)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = [row for name in RECIPES for row in judge(name, options)]
    print(f"{'recipe':<9}{'K':>4}{'objective':>11}{'distinct > 0.1':>16}{'types ≥ 80%':>13}{'≥ 60%':>7}{'halves':>8}")
    for row in results:
        print(f"{row['recipe']:<9}{row['atoms']:>4}{row['objective']:>11.4f}{row['distinct']:>16}{row['types_80']:>13}"
              f"{row['types_60']:>7}{row['matched']:>8.0%}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def judge(name: str, options: argparse.Namespace) -> list[dict]:
    """One row a dictionary size."""
    config = DiscoverConfig(
        model=options.model, data=options.data, out=options.work / name, adapter=options.adapter, limit=options.limit,
        batch_tokens=options.batch_tokens,
        curvature=CurvatureConfig(options.factor_documents, options.factor_documents),
    )  # fmt: skip
    parts = {part: dataclasses.replace(getattr(config, part), **recipe_settings(name, part)) for part in RECIPES[name]}
    run = Run(dataclasses.replace(config, **parts), Progress())
    store = run.rows(run.projection(run.adapter()))
    tasks = [json.loads(line)["task"] for line in options.data.read_text(encoding="utf-8").splitlines()]
    return [score(name, run, store, tasks, atoms) for atoms in options.atoms]


def score(name: str, run: Run, store: RowStore, tasks: list[str], atoms: int) -> dict:
    """Learns a dictionary of `atoms` atoms from all documents and judges it."""
    config = dataclasses.replace(run.config.dictionary, atoms=atoms)
    everyone = list(range(len(store)))
    dictionary = learn_dictionary(store, everyone, config, run.config.seed, run.progress)
    documents, codes = encode(store, everyone, dictionary.atoms, config)
    ours = SelectConfig(keep=len(dictionary.atoms), min_stability=0.0, min_z=-1e6)  # judged by our scorer
    lengths = [len(document.response_ids) for document in run.encoded.documents]
    found = candidates(store, documents, codes, lengths, ours, run.config.seed)
    distinct = select(found, dictionary.atoms, torch.ones(len(dictionary.atoms)), ours)
    kept = [c for c in distinct if c.coherence.raw > COHERENT]
    purity = best_purity(kept, tasks)
    return {
        "recipe": name, "atoms": atoms, "objective": dictionary.objectives[-1], "distinct": len(kept),
        "types_80": sum(p >= 0.8 for p in purity.values()), "types_60": sum(p >= 0.6 for p in purity.values()),
        "matched": half_split(store, everyone, config, run, dictionary.atoms, kept), "purity": purity,
        "coherence": sorted((round(c.coherence.raw, 4) for c in kept), reverse=True),
    }  # fmt: skip


def best_purity(kept: list[Candidate], tasks: list[str]) -> dict[str, float]:
    """Task -> largest share of an atom's top documents (at least 8) that are of the task."""
    best: dict[str, float] = {}
    for candidate in kept:
        if len(candidate.documents) >= 8:
            task, count = Counter(tasks[d] for d in candidate.documents).most_common(1)[0]
            best[task] = max(best.get(task, 0.0), count / len(candidate.documents))
    return best


def half_split(store: RowStore, everyone: list[int], config, run: Run, atoms, kept: list[Candidate]) -> float:
    """Share of the kept atoms that dictionaries of *both* random halves hold with |cos| > 0.8."""
    order = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(run.config.seed)).tolist()
    matched = torch.ones(len(atoms), dtype=torch.bool)
    for half in (order[: len(order) // 2], order[len(order) // 2 :]):
        learned = learn_dictionary(store, sorted(half), config, run.config.seed, run.progress, "half")
        matched &= stability(atoms, learned.atoms) > MATCHED
    return float(matched[[c.atom for c in kept]].float().mean()) if kept else 0.0


if __name__ == "__main__":
    main()
