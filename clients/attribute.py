"""`attribute`: the atoms of new documents, as text for people or as JSON lines for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from atoms.errors import DataError
from atoms.package import Package
from offline.attribute import Attribution, Attributor
from offline.corpus import Document, parse_document, read_corpus
from server.embedded.load import EngineOptions, load_base

_PROMPT_WIDTH = 60

Evidence = Mapping[str, Sequence[Mapping[str, Any]]]
"""Atom id -> its training documents, strongest first."""


def given_documents(
    text: str | None, prompt: str | None, system: str | None, messages: str | None, data: Path | None
) -> Sequence[Document]:
    """The documents that the options name. Raises DataError unless they are given in exactly one way."""
    if sum(value is not None for value in (text, messages, data)) != 1:
        raise DataError("give the document in one way: --text (with --prompt, --system), --messages or --data")
    if text is None and (prompt is not None or system is not None):
        raise DataError("--prompt and --system belong to --text, the response; --messages and --data hold their own")
    if data is not None:
        return read_corpus(data).documents
    try:
        if messages is not None:
            return (parse_document({"id": "messages", "messages": json.loads(messages)}),)
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns += [{"role": "user", "content": prompt or ""}, {"role": "assistant", "content": text or ""}]
        return (parse_document({"id": "text", "messages": turns}),)
    except ValueError as error:
        raise DataError(f"--messages is no JSON: {error}; give a list of objects with role and content") from None
    except DataError as error:
        option = "--text" if messages is None else "--messages"
        raise DataError(f"{option}: {error}; attribution needs the response whose gradient it follows") from None


def print_attributions(
    path: Path, documents: Sequence[Document], options: EngineOptions, *, max_length: int | None, batch_tokens: int,
    top: int, examples: int, as_json: bool,
) -> None:  # fmt: skip
    """Prints one attribution a document, each as soon as its block is done. Truncated prompts are told on standard error."""
    package = Package.read(path)
    model, tokenizer = load_base(package, options)
    evidence = {line["atom"]: line["documents"][:examples] for line in package.evidence()}
    console = Console()
    with Attributor(package, model, tokenizer, max_length=max_length, batch_tokens=batch_tokens) as attributor:
        for attribution in attributor.attribute(documents):
            if attribution.truncated:
                print(f"{attribution.document.id}: cut {attribution.truncated} prompt tokens from the left to fit "
                      f"{attributor.max_length} tokens", file=sys.stderr)  # fmt: skip
            if as_json:
                print(json.dumps(to_json(attribution, evidence, top), ensure_ascii=False), flush=True)
            else:
                console.print(_table(attribution, evidence, top))


def to_json(attribution: Attribution, evidence: Evidence, top: int) -> dict[str, Any]:
    """One JSON object: the `top` atoms with their documents' ids and codes, the share of all further atoms, the rest."""
    return {
        "id": attribution.document.id,
        "tokens": attribution.tokens,
        "truncated_prompt_tokens": attribution.truncated,
        "loss": attribution.loss,
        "atoms": [
            {
                "atom": part.card.id if part.card else None,
                "alias": part.card.alias if part.card else None,
                "dictionary_index": part.index,
                "code": part.code,
                "share": part.share,
                "documents": [
                    {"id": d["id"], "code": d["code"]} for d in (evidence.get(part.card.id, []) if part.card else [])
                ],
            }
            for part in attribution.atoms[:top]
        ],
        "further_atoms": sum(part.share for part in attribution.atoms[top:]),
        "unexplained": attribution.unexplained,
    }


def _table(attribution: Attribution, evidence: Evidence, top: int) -> Table:
    document = attribution.document
    table = Table(
        title=Text(f"{document.id} · {attribution.tokens} tokens · loss {attribution.loss:.3f}"), title_justify="left"
    )
    for heading, justify in (("share", "right"), ("code", "right"), ("atom", "left"), ("keywords", "left"),
                             ("training documents behind it", "left")):  # fmt: skip
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for part in attribution.atoms[:top]:
        behind = evidence.get(part.card.id, []) if part.card else []
        words = Text(" ".join(part.card.keywords) if part.card else "")
        shown = Text("\n".join(f"{d['id']}: {_clip(d['prompt'])}" for d in behind))
        table.add_row(f"{part.share:.1%}", f"{part.code:.3f}", part.name, words, shown)
    if rest := attribution.atoms[top:]:
        table.add_row(f"{sum(part.share for part in rest):.1%}", "", f"{len(rest)} further atoms")
    table.add_row(f"{attribution.unexplained:.1%}", "", "unexplained", end_section=True)
    return table


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _PROMPT_WIDTH else line[: _PROMPT_WIDTH - 1] + "…"
