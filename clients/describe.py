"""`describe`: a language model reads each atom's documents beside those of other atoms, and says what sets them apart.

Any OpenAI-compatible server will do. The documents are other people's text, which may tell the model what to say: its answer
is kept as one line of plain text, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from atoms.errors import AtomsteerError, DataError
from atoms.manifest import AtomCard
from atoms.package import Package
from clients.connection import connect
from offline.progress import Progress
from offline.report import write_report

if TYPE_CHECKING:
    from openai import OpenAI

LONGEST = 200
"""Characters of a description."""
_SHOWN = 400
"""Characters that are shown of a document's prompt, and of its response."""
_GO_ON = "the atoms before it are described: run the command again to go on"
_TASK = """\
A group of answers has something in common that the other answers lack: a form (a list, code, one word …), a task, a \
subject or a tone. Say what it is, in one sentence of at most 20 words. Write nothing but the sentence.

{group}

{others}

What do the answers of the group have in common that the other answers lack? One sentence of at most 20 words:"""


class DescribingError(AtomsteerError):
    """The server refused, could not be reached, or said nothing; what was described before is kept."""


def describe_atoms(
    package: Package, server: str, key: str | None, model: str | None, documents: int, max_tokens: int, *,
    again: bool = False, progress: Progress | None = None,
) -> Package:  # fmt: skip
    """Writes a description by `model` (None: the first that the server lists) into every card, each as it comes, and returns
    the package as it is then. Atoms that it has described already are left alone unless `again`.

    `documents`: of the atom, and as many of others, that the model is shown. `max_tokens`: of an answer, thoughts included.
    Raises DataError for a package without documents,
    DescribingError, and what `connect` raises.
    """
    evidence = {line["atom"]: line["documents"] for line in package.evidence()}
    if not evidence:
        raise DataError(f"{package.path} holds no documents to describe atoms by; discover it without --no-documents")
    from openai import OpenAI

    with connect(None, server, key) as connection, OpenAI(base_url=connection.url, api_key=connection.key) as client:
        name = model or connection.model
        cards = package.manifest.atoms
        pending = [card for card in cards if again or card.described_by != name]
        try:
            with (progress or Progress()).task("describe", len(cards), "atoms", len(cards) - len(pending)) as bar:
                for card in pending:
                    said = _ask(client, name, card, _question(card.id, evidence, documents), max_tokens)
                    package = _with_description(package, card.id, said, name)
                    bar.advance()
        finally:
            write_report(package)
    return package


def _with_description(package: Package, atom: str, description: str, model: str) -> Package:
    said = {"description": description, "described_by": model}
    return package.update(
        [card.model_copy(update=said) if card.id == atom else card for card in package.manifest.atoms]
    )


def _question(atom: str, evidence: Mapping[str, Sequence[Mapping[str, Any]]], count: int) -> str:
    """The strongest documents of `atom`, and the strongest of the others that are none of its own, from as many as can be."""
    own = evidence[atom]
    known, others = {document["id"] for document in own}, []
    for rank in range(max(map(len, evidence.values()))):
        for documents in evidence.values():
            if rank < len(documents) and (document := documents[rank])["id"] not in known:
                known.add(document["id"])
                others.append(document)
    return _TASK.format(group=_shown("GROUP", own[:count]), others=_shown("OTHER", others[:count]))


def _shown(title: str, documents: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join(
        f"{title}, question {n}: {_clip(document['prompt'])}\n{title}, answer {n}: {_clip(document['response'])}"
        for n, document in enumerate(documents, 1)
    )


def _clip(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 2] + " …"


def _ask(client: OpenAI, model: str, card: AtomCard, question: str, max_tokens: int) -> str:
    from openai import OpenAIError

    try:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_completion_tokens=max_tokens
        )  # no temperature: some models refuse all but their own
    except OpenAIError as error:
        raise DescribingError(f"describing {card.name}: {getattr(error, 'message', error)}; {_GO_ON}") from error
    content = answer.choices[0].message.content if answer.choices else None
    if not (said := one_line(content or "")):
        raise DescribingError(f"describing {card.name}: {model} answered with no text; {_GO_ON}")
    return said


def one_line(text: str) -> str:
    """`text` as a description: printable characters, single blanks, no quotes around it, at most `LONGEST` characters."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(plain) > 1 and plain[0] == plain[-1] and plain[0] in "\"'`":
        plain = plain[1:-1].strip()
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 1].rstrip() + "…"
