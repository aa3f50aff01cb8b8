"""What a direction's path is made of: rates of labelled behaviours on development prompts, with one choice changed at a time.

    python -m bench.paths --package PKG --data FILE.jsonl --label bulleted-list=bulleted_list --label fenced-code=code
                          [--only default,"own prompts"] [--nats 0.2 0.4] [--temperature 0.7] [--json FILE]

Paths (offline/paths.py) of documents with a behaviour's label (`task` of each line), so that the path is judged apart from
the dictionary. Each is scaled to the measured --nats along twelve unsteered answers; its answers to the neutral development
prompts give the rate and the share that is degenerate. Directions are kept in --work, as are answers.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from atoms.detectors import get_detector
from atoms.mix import Mix
from atoms.package import Package
from atoms.space import Direction
from atoms.storage import recipe_file, sha256_file, write_tensors
from clients.evaluate import parse_labels
from clients.harness import open_harness
from offline.config import PASS_TOKENS, SteeringConfig
from offline.corpus import EncodedDocument, encode_corpus, read_corpus
from offline.evaluation.answers import Answer, Decoding
from offline.evaluation.controls import Control, control_direction, projection_of
from offline.evaluation.document_controls import DocumentGroups, read_labels, sample_labelled
from offline.evaluation.measures import degenerate_share, rate
from offline.evaluation.prompts import choose_prompts, read_prompts
from offline.lora import frozen_lora
from offline.paths import PathMaker
from offline.progress import Progress
from offline.record import recorded_settings
from offline.shipped import shipped_file
from server.embedded.load import EngineOptions, load_base

UNSTEERED = "unsteered"
FIELD = "task"


@dataclass(frozen=True)
class Variant:
    """Settings, and functions of offline/paths.py that are replaced."""

    config: SteeringConfig = SteeringConfig()
    replaced: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def with_prompts(exchanged: bool) -> Callable[..., list[EncodedDocument]]:
    """In place of `prepared`: every document with its own prompt, or every one with another's."""

    def prepared(
        documents: Sequence[EncodedDocument], pool: Sequence[EncodedDocument], tokens: int, count: int
    ) -> list[EncodedDocument]:
        longest, made = max(map(len, pool)), []
        for document in (2 * list(documents))[:count]:  # few are taken twice, as there
            prompt = random.Random(document.row).choice(pool).prompt_ids if exchanged else document.prompt_ids
            response = document.response_ids[:tokens]
            made.append(EncodedDocument(document.row, prompt[-(longest - len(response)) :], response))
        return made

    return prepared


def without(share: float) -> Callable[[Direction, Direction], dict[str, Tensor]]:
    """In place of `downhill`: the unit direction against the gradient less `share` of what all documents share."""

    def downhill(gradient: Direction, shared: Direction) -> dict[str, Tensor]:
        direction = {key: share * shared[key] - value for key, value in gradient.items()}
        norm = max(float(torch.stack([value.square().sum() for value in direction.values()]).sum().sqrt()), 1e-30)
        return {key: value / norm for key, value in direction.items()}

    return downhill


VARIANTS = {
    "default": Variant(),
    "one step": Variant(SteeringConfig(steps=1)),
    "two steps": Variant(SteeringConfig(steps=2)),
    "six steps": Variant(SteeringConfig(steps=6)),
    "6 tokens": Variant(SteeringConfig(tokens=6)),
    "24 tokens": Variant(SteeringConfig(tokens=24)),
    "whole responses": Variant(SteeringConfig(tokens=10**6)),
    "own prompts": Variant(replaced={"prepared": with_prompts(exchanged=False)}),
    "others' prompts": Variant(replaced={"prepared": with_prompts(exchanged=True)}),
    "shared part left in": Variant(replaced={"downhill": without(0.0)}),
    "mean taken off": Variant(replaced={"downhill": without(1.0)}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="of which θ0 and the drift's scale are taken")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--label", action="append", required=True, help="BEHAVIOUR=LABEL; repeat")
    parser.add_argument("--work", type=Path, default=Path(".cache/paths"))
    parser.add_argument("--only", help=f"comma separated, of: {', '.join(VARIANTS)}")
    parser.add_argument("--nats", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--documents", type=int, default=32, help="labelled documents a behaviour")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    labels = parse_labels(options.label)
    for behaviour in labels:
        get_detector(behaviour)  # before any path is made
    names = options.only.split(",") if options.only else list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"there is no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    package, progress = Package.read(options.package), Progress()
    made = directions(package, labels, names, options, progress)
    rows = list(judge(package, made, options))
    print(table(rows, list(labels)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def directions(
    package: Package, labels: Mapping[str, str], names: Sequence[str], options: argparse.Namespace, progress: Progress
) -> dict[tuple[str, str], Direction]:
    """(variant, behaviour) -> its path, made where it is not in `options.work` yet."""
    max_length = recorded_settings(package)["max_length"]
    common = [package.manifest.base_model.weights, package.manifest.adapter_hash, max_length, sha256_file(options.data),
              options.documents, options.dtype]  # fmt: skip

    def file(name: str, behaviour: str) -> Path:
        variant = VARIANTS[name]
        recipe = [*common, asdict(variant.config), sorted(variant.replaced), name, labels[behaviour]]
        return recipe_file(options.work, "path", recipe)

    files = {(name, behaviour): file(name, behaviour) for name in names for behaviour in labels}
    missing = {key: path for key, path in files.items() if not path.exists()}
    if missing:
        make_paths(package, labels, missing, options, progress)
        gc.collect()  # the unmerged model
    return {key: load_file(path) for key, path in files.items()}


def make_paths(
    package: Package, labels: Mapping[str, str], missing: Mapping[tuple[str, str], Path], options: argparse.Namespace,
    progress: Progress,
) -> None:  # fmt: skip
    """Makes and writes the `missing` paths, one variant after the other: its documents' shared gradient is made once."""
    model, tokenizer = load_base(package, EngineOptions(dtype=options.dtype))
    max_length = recorded_settings(package)["max_length"]
    pool = encode_corpus(read_corpus(options.data), tokenizer, max_length).documents
    found = read_labels(options.data, FIELD)
    wanted = DocumentGroups(options.data, FIELD, labels, options.documents)
    groups = {behaviour: sample_labelled(pool, found, wanted, label) for behaviour, label in labels.items()}
    space = package.base_adapter.space
    peft = frozen_lora(model, package.path / "base", space)
    with progress.task("paths", len(missing), "paths") as bar:
        for name in dict.fromkeys(name for name, _ in missing):
            with ExitStack() as stack:
                for function, other in VARIANTS[name].replaced.items():
                    stack.enter_context(patch(f"offline.paths.{function}", other))
                maker = PathMaker.of(peft, space, pool, VARIANTS[name].config, PASS_TOKENS)
                for behaviour in (b for n, b in missing if n == name):
                    write_tensors(missing[name, behaviour], maker.direction(groups[behaviour]))
                    bar.advance()


def judge(
    package: Package, made: Mapping[tuple[str, str], Direction], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row a behaviour unsteered, then one a variant, behaviour and strength."""
    prompts = read_prompts(shipped_file("evaluation_prompts"))
    decoding = Decoding(options.max_tokens, options.temperature)
    projection = projection_of(package)
    with open_harness(
        package, options.work, decoding, EngineOptions(dtype=options.dtype, slots=options.slots)
    ) as harness:
        for behaviour in dict.fromkeys(behaviour for _, behaviour in made):
            asked = [row.prompt for row in choose_prompts(prompts, behaviour, "neutral", "dev", None)]
            (unsteered,) = harness.answerer.answer(asked, [Mix()])
            meter = harness.meter(unsteered[:12])
            yield measured(UNSTEERED, behaviour, 0.0, unsteered)
            for name in dict.fromkeys(name for name, _ in made):
                for nats in options.nats:
                    scaled, kl = control_direction(projection, meter, Control(name, made[name, behaviour]), nats)
                    mix = harness.directions.add(f"{name}, {behaviour}, {nats}", scaled)
                    (answers,) = harness.answerer.answer(asked, [mix])
                    yield measured(name, behaviour, kl, answers)


def measured(name: str, behaviour: str, nats: float, answers: Sequence[Answer]) -> dict[str, Any]:
    """A row of the results; also printed, as the whole takes long."""
    row = {"variant": name, "behaviour": behaviour, "nats": nats, "n": len(answers),
           "rate": rate(answers, get_detector(behaviour)), "degenerate": degenerate_share(answers)}  # fmt: skip
    print(
        f"{behaviour:<16}{name:<22}{nats:.2f} nats {row['rate']:5.0%} {row['degenerate']:5.0%} degenerate", flush=True
    )
    return row


def table(rows: Sequence[Mapping[str, Any]], behaviours: Sequence[str]) -> str:
    """Markdown: a line a variant, in each behaviour's cell `rate, degenerate` at every strength."""
    lines = ["| | " + " | ".join(behaviours) + " |", "|---" * (len(behaviours) + 1) + "|"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = [
            "; ".join(
                f"{r['rate']:.0%}, {r['degenerate']:.0%}"
                for r in rows
                if (r["variant"], r["behaviour"]) == (name, behaviour)
            )
            for behaviour in behaviours
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
