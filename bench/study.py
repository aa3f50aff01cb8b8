"""What makes atoms good: one change at a time, on the same gradients, judged by the same scorer.

    python -m bench.study_gradients --model DIR --adapter DIR --data FILE.jsonl --work DIR [--limit N]   # once: the gradients
    python -m bench.study --work DIR --data FILE.jsonl [--limit N] [--atoms K …] [--only NAME,…] [--seeds 2]
                           [--packaged] [--json FILE]

Scorer, for every setting and every other way of grouping documents: the top 20 documents of an atom (at least 8), raw
coherence from sketches, near-duplicates (|cos| > 0.8) of better atoms removed; directions are compared as the gradients that
they stand for, with the whitening across matrices undone. Shown are the distinct atoms of raw coherence above 0.1; how many
task types have an atom with at least 80% and 60% of one type among its top documents; the same for the half of the types on
which settings may be chosen ("chosen on"); and the share of the coherent atoms found again (|cos| > 0.8) in both of two
random halves of the documents. With --packaged also how many atoms a discovery would package, the task types of those, and
the share of them that is found again (each with a match of its own); that takes the next seed's dictionary. Means over
seeds. Task labels (`task` of each line) are read here only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from atoms.projection import MatrixBasis
from atoms.space import natural_key
from atoms.storage import write_json, write_tensors
from offline.coherence import coherence
from offline.config import RECIPES, CurvatureConfig, DictionaryConfig, SelectConfig, WhiteningConfig
from offline.corpus import read_corpus
from offline.curvature import factors_from_tensors, kronecker_eigenvalues
from offline.dictionary import dictionary_size, encode, learn_dictionary
from offline.progress import Progress
from offline.rows import RowStore, shard_path
from offline.select import candidates, select
from offline.stability import FOUND_AGAIN, split_halves, stability
from offline.whitening import fit_whitening

QUIET = Progress(quiet=True)
OTHERS = "others"
COHERENT, DUPLICATE, TOP, FEWEST = 0.1, 0.8, 20, 8

Grouping = Callable[[int, Sequence[int]], tuple[Tensor, Tensor]]
"""Called with a seed and document numbers (n): (directions (K, D) of unit length, weights (n, K) ≥ 0 of the documents)."""


@dataclass(frozen=True)
class Setting:
    """One way through the pipeline. `matrices`: part of the keys that are used. `total`: components kept over all matrices by
    λ, in place of as many a matrix. `empirical`: λ from the documents' real labels."""

    curvature: dict[str, Any] = field(default_factory=dict)
    whitening: dict[str, Any] = field(default_factory=dict)
    dictionary: dict[str, Any] = field(default_factory=dict)
    matrices: str = ""
    total: bool = False
    empirical: bool = False


def settings() -> dict[str, Setting]:
    """The default, the published recipe, and one change at a time."""
    paper = RECIPES["paper"]
    return {
        "default": Setting(),
        "paper": Setting(paper["curvature"], paper["whitening"], paper["dictionary"]),
        "paper with our learner": Setting(paper["curvature"], paper["whitening"], {"nonnegative": False}),
        "λ of the factors (K-FAC)": Setting({"eigenvalues": "kronecker"}),
        "λ of real labels": Setting(empirical=True),
        **{f"damping {d}": Setting({"damping": d}) for d in (0.001, 0.01, 1.0, 10.0)},
        **{f"{k} components a matrix": Setting({"components": k}) for k in (10, 25, 100)},
        "components chosen globally": Setting(total=True),
        "mean kept": Setting(whitening={"centred": False}),
        "rows not whitened": Setting(whitening={"ridge": 0.0}),
        **{f"ridge {r}": Setting(whitening={"ridge": r}) for r in (0.001, 0.003, 0.03, 0.1)},
        "A matrices": Setting(matrices="lora_A"),
        "B matrices": Setting(matrices="lora_B"),
        "queries": Setting(matrices="q_proj"),
        "values": Setting(matrices="v_proj"),
        **{f"α = {a}": Setting(dictionary={"alpha": a}) for a in (0.06, 0.08, 0.12, 0.15)},
        "signed codes": Setting(dictionary={"nonnegative": False}),
    }


class Gradients:
    """Whole gradients of the first `limit` documents, shard by shard, with what the curvature needs."""

    def __init__(self, work: Path, limit: int | None) -> None:
        self.work, self.shards, self.count = work, [], 0
        for path in sorted(work.glob("gradients-*.safetensors")):
            if limit is None or self.count < limit:
                self.shards.append(path)
                with safe_open(path, framework="pt") as file:
                    self.count += file.get_slice("document").get_shape()[0]
        with safe_open(work / "factors.safetensors", framework="pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        shapes = {key.removesuffix(".q_out"): (n[0], stored[key.removesuffix("q_out") + "q_in"][0])
                  for key, n in stored.items() if key.endswith(".q_out")}  # fmt: skip
        self.keys, self.shapes = sorted(shapes, key=natural_key), shapes
        self.factors = factors_from_tensors(load_file(work / "factors.safetensors"), self.keys)
        self.fisher = load_file(work / "eigenvalues.safetensors")

    def lengths(self) -> list[int]:
        """Label tokens of every document."""
        return [int(count) for path in self.shards for count in load_file(path)["tokens"]]

    def parts(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """(key, gradients (n, o, i) float32) of one shard, of unit length over all keys."""
        with safe_open(path, framework="pt") as file:
            flat, start = file.get_tensor("gradient"), 0
        for key in self.keys:
            o, i = self.shapes[key]
            yield key, flat[:, start : start + o * i].float().view(-1, o, i) / 64
            start += o * i
        assert start == flat.shape[1], "the gradients are of another space than the factors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument(
        "--atoms", type=int, nargs="+", metavar="K", help="sizes of dictionaries; default: the discovery's"
    )
    parser.add_argument("--only", help="names of settings, comma separated; others: k-means and the like")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--packaged", action="store_true", help="also select atoms as a discovery does")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(",")] if options.only else [*settings(), OTHERS]
    if unknown := set(names) - {*settings(), OTHERS}:
        parser.error(f"no setting {', '.join(sorted(unknown))}; there are {', '.join(settings())}, {OTHERS}")
    if OTHERS in names and "default" not in names:
        parser.error(f"{OTHERS} group the rows of default; name that too")
    gradients = Gradients(options.work, options.limit)
    texts = [f"{d.prompt}\n{d.response}" for d in read_corpus(options.data, limit=gradients.count).documents]
    lines = options.data.read_text(encoding="utf-8").splitlines()[: gradients.count]
    tasks = [json.loads(line)["task"] for line in lines]
    sizes = options.atoms or [dictionary_size(DictionaryConfig(), gradients.count)]
    chosen = {name: setting for name, setting in settings().items() if name in names}
    print(f"{gradients.count} documents, {len(set(tasks))} task types")
    print(
        f"{'':<30}{'K':>5}{'coherent':>9}{'kept':>6}{'≥ 80%':>7}{'≥ 60%':>7}{'chosen on':>11}{'halves':>8}{'codes':>7}"
        + (f"{'packaged':>10}{'≥ 80%':>7}{'≥ 60%':>7}{'halves':>8}" if options.packaged else "")
    )
    results = []
    for name, setting in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            rows = projected(gradients, setting, Path(folder))
            lengths = gradients.lengths() if options.packaged else None
            for atoms in sizes:
                judged = [judge(rows, setting, atoms, tasks, seed, lengths) for seed in range(options.seeds)]
                results.append(show(name, average(judged)))
                if name == "default" and OTHERS in names:
                    for other, group in others(rows, texts, atoms).items():
                        judged = [judge_group(group, rows, tasks, seed) for seed in range(options.seeds)]
                        results.append(show(other, average(judged)))
        if options.json:  # after every setting: a study of hours may be stopped
            write_json(options.json, results)


def projected(gradients: Gradients, setting: Setting, folder: Path) -> RowStore:
    """Rows of every document under `setting`, as the pipeline would have stored them, and their whitening."""
    bases = basis(gradients, setting)
    for number, path in enumerate(gradients.shards):
        stored = load_file(path)
        scale = stored["norm"][:, None]
        rows = torch.cat([bases[key].project(part) for key, part in gradients.parts(path) if key in bases], dim=1)
        write_tensors(shard_path(folder, number),
                      {"document": stored["document"], "row": rows * scale, "sketch": stored["sketch"]})  # fmt: skip
    store = RowStore(folder)
    return dataclasses.replace(store, fitted=fit_whitening(store, WhiteningConfig(**setting.whitening), QUIET))


def basis(gradients: Gradients, setting: Setting) -> dict[str, MatrixBasis]:
    config = CurvatureConfig(**setting.curvature)
    keys = [key for key in gradients.keys if setting.matrices in key]
    eigenvalues: dict[str, Tensor] = {key: gradients.fisher[key].double() for key in keys}
    if config.eigenvalues == "kronecker":
        eigenvalues = kronecker_eigenvalues({key: gradients.factors[key] for key in keys})
    if setting.empirical:
        eigenvalues = empirical_eigenvalues(gradients, keys)
    counts = dict.fromkeys(keys, config.components)
    if setting.total:
        everything = torch.cat([eigenvalues[key].flatten() for key in keys])
        least = float(everything.topk(min(config.components * len(keys), len(everything))).values[-1])
        counts = {key: max(1, int((eigenvalues[key] >= least).sum())) for key in keys}
    return {
        key: MatrixBasis.of(gradients.factors[key].q_out, gradients.factors[key].q_in, eigenvalues[key], counts[key],
                            config.damping, relative=not config.absolute_damping)
        for key in keys
    }  # fmt: skip


def empirical_eigenvalues(gradients: Gradients, keys: Sequence[str]) -> dict[str, Tensor]:
    """λ from the summed gradients of the real labels of the first shard's documents."""
    path = gradients.shards[0]
    stored = load_file(path)
    summed = (stored["norm"] * stored["tokens"])[:, None, None]
    found = {}
    for key, part in gradients.parts(path):
        if key in keys:
            rotated = gradients.factors[key].q_out.T @ (part * summed) @ gradients.factors[key].q_in
            found[key] = rotated.double().square().sum(0) / float(stored["tokens"].sum())
    return found


def judge(
    store: RowStore, setting: Setting, atoms: int, tasks: Sequence[str], seed: int, lengths: Sequence[int] | None = None
) -> dict[str, float]:
    """Learns a dictionary with `seed`, and two of the halves, and rates it; with `lengths` of the documents also what a
    discovery would package of it."""
    config = DictionaryConfig(**{"atoms": atoms, **setting.dictionary})
    everyone = list(range(len(store)))
    learned = learn_dictionary(store, everyone, config, seed, QUIET)
    encoded = encode(store, everyone, learned.atoms, config)
    codes = encoded.to_dense()
    directions = store.whitening.gradients(learned.atoms)
    halves = [store.whitening.gradients(learn_dictionary(store, half, config, seed, QUIET).atoms)
              for half in split_halves(range(len(store)), seed)]  # fmt: skip
    found_again = in_both(directions, halves)
    rated = rate(directions, codes.abs(), store, tasks, codes.sign(), found_again)
    if lengths is not None:
        second = learn_dictionary(store, everyone, config, seed + 1, QUIET).atoms
        found = candidates(store, encoded, lengths, SelectConfig(), seed)
        chosen = select(found, directions, stability(directions, store.whitening.gradients(second)), SelectConfig())
        kept = directions[[c.atom for c in chosen]]
        best = purities([c.documents for c in chosen], tasks)
        rated |= {
            "packaged": len(chosen),
            "packaged_80": sum(p >= 0.8 for p in best.values()),
            "packaged_60": sum(p >= 0.6 for p in best.values()),
            "packaged_halves": float(in_both(kept, halves).float().mean()),
        }
    return rated


def judge_group(group: Grouping, store: RowStore, tasks: Sequence[str], seed: int) -> dict[str, float]:
    """Rates another way to make groups, of all documents and of the same halves (found again with either sign)."""
    directions, weights = group(seed, list(range(len(store))))
    halves = [group(seed, half)[0] for half in split_halves(range(len(store)), seed)]
    return rate(directions, weights, store, tasks, found_again=in_both(directions, halves))


def in_both(directions: Tensor, halves: Sequence[Tensor]) -> Tensor:
    """Which of unit directions (n, D) have a match of their own in the dictionaries of both halves, (n,)."""
    return torch.stack([stability(directions, half) > FOUND_AGAIN for half in halves]).all(0)


def purities(groups: Sequence[Sequence[int]], tasks: Sequence[str]) -> dict[str, float]:
    """Task type -> the largest share that it has of a group in which it is the most frequent."""
    best: dict[str, float] = {}
    for members in groups:
        task, count = Counter(tasks[d] for d in members).most_common(1)[0]
        best[task] = max(best.get(task, 0.0), count / len(members))
    return best


def rate(
    directions: Tensor, weights: Tensor, store: RowStore, tasks: Sequence[str], signs: Tensor | None = None,
    found_again: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """The scorer: unit directions (K, D) of atoms or groups, weights (N, K) ≥ 0 by which documents belong to them."""
    groups = []
    for atom in range(weights.shape[1]):
        size = int((weights[:, atom] > 0).sum())
        if size >= FEWEST:
            top = weights[:, atom].topk(min(TOP, size)).indices
            sign = torch.ones(len(top)) if signs is None else signs[top, atom]
            groups.append((coherence(store.sketches(top.tolist()), sign), atom, top.tolist()))
    kept: list[tuple[float, int, list[int]]] = []
    for group in sorted(groups, reverse=True):
        cosines = directions[[k[1] for k in kept]] @ directions[group[1]]
        if (
            not kept or float((cosines if signs is None else cosines.abs()).max()) <= DUPLICATE
        ):  # without signs −d is another group
            kept.append(group)
    best = purities([members for _, _, members in kept], tasks)
    chosen_on = sorted(set(tasks))[::2]
    coherent = [k for k in kept if k[0] > COHERENT]
    matched = {}
    if found_again is not None:
        matched["halves"] = float(found_again[[k[1] for k in coherent]].float().mean()) if coherent else 0.0
    return {"K": len(directions), "coherent": len(coherent), "kept": len(kept),
            "types_80": sum(p >= 0.8 for p in best.values()), "types_60": sum(p >= 0.6 for p in best.values()),
            "chosen_80": sum(best.get(t, 0) >= 0.8 for t in chosen_on),
            "chosen_60": sum(best.get(t, 0) >= 0.6 for t in chosen_on),
            **matched, "codes": float((weights > 0).float().sum(1).mean())}  # fmt: skip


def others(store: RowStore, texts: Sequence[str], count: int) -> dict[str, Grouping]:
    """Other ways to make `count` groups of the same documents."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = store.whitened_rows(range(len(store)))
    plain = torch.nn.functional.normalize(store.stored_rows(range(len(store))) - store.whitening.mean, dim=1)
    words = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(texts)
    latent = torch.from_numpy(TruncatedSVD(100, random_state=0).fit_transform(words)).float()
    text = torch.nn.functional.normalize(latent, dim=1)

    def k_means(points: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Spherical in effect: the points have unit length. A document belongs to its cluster by its cosine to the centroid."""
        model = KMeans(count, n_init=3, random_state=seed).fit(points.numpy())
        centroids = torch.nn.functional.normalize(torch.from_numpy(model.cluster_centers_).float(), dim=1)
        member = torch.nn.functional.one_hot(torch.from_numpy(model.labels_).long(), count)
        return centroids, (points @ centroids.T).clamp_min(1e-6) * member

    def components(points: Tensor, _seed: int) -> tuple[Tensor, Tensor]:
        """Each principal component is two groups, one for each sign."""
        directions = torch.linalg.svd(points, full_matrices=False).Vh[: count // 2]
        scores = points @ directions.T
        far = torch.cat([scores.clamp_min(0), (-scores).clamp_min(0)], dim=1)
        return torch.cat([directions, -directions]), far

    def undone(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return store.whitening.gradients(found[0]), found[1]

    return {
        "spherical k-means, our rows": lambda seed, documents: undone(k_means(rows[documents], seed)),
        "spherical k-means, plain rows": lambda seed, documents: k_means(plain[documents], seed),
        "principal components, our rows": lambda seed, documents: undone(components(rows[documents], seed)),
        "principal components, plain": lambda seed, documents: components(plain[documents], seed),
        "clusters of the text (LSA)": lambda seed, documents: k_means(text[documents], seed),
    }


def average(judged: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in judged) / len(judged) for key in judged[0]}


def show(name: str, row: dict[str, float]) -> dict[str, Any]:
    chosen = f"{row['chosen_80']:.1f}/{row['chosen_60']:.1f}"
    halves, packaged = f"{row['halves']:.0%}" if "halves" in row else "", ""
    if "packaged" in row:
        packaged = f"{row['packaged']:>10.1f}{row['packaged_80']:>7.1f}{row['packaged_60']:>7.1f}{row['packaged_halves']:>8.0%}"
    print(f"{name:<30}{row['K']:>5.0f}{row['coherent']:>9.1f}{row['kept']:>6.1f}{row['types_80']:>7.1f}{row['types_60']:>7.1f}"
          f"{chosen:>11}{halves:>8}{row['codes']:>7.1f}{packaged}", flush=True)  # fmt: skip
    return {"setting": name, **row}


if __name__ == "__main__":
    main()
