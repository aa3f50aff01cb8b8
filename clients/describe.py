"""`describe`: a language model reads each atom's documents beside those of other atoms, and says what sets them apart.

The documents are other people's text, which may tell the model what to say: its answer is kept as one line of plain text. An
atom that it says nothing about is passed over; a server that would refuse the others, too, ends the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from atoms.errors import AtomsteerError, ConfigError, DataError
from atoms.manifest import AtomCard
from atoms.package import Package
from clients.plain_openai import without_environment
from offline.progress import Progress
from offline.report import write_report

if TYPE_CHECKING:
    from openai import OpenAI

LONGEST = 200
"""Characters of a description, and of the name of the model that wrote it."""
_SHOWN = 400
"""Characters that are shown of a document's prompt, and of its response."""
_FATAL = (401, 403, 404)
"""Statuses that every atom would get."""
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "«": "»"}
_SENTENCE = re.compile(r".*[.!?](?=\s|$)")
_THOUGHT = re.compile(r"\s*<think>.*?(</think>|$)", re.DOTALL)
_TASK = """\
A group of answers has something in common{contrast}: a form (a list, code, one word …), a task, a subject or a tone. Say what \
it is, in one sentence of at most 20 words. Write nothing but the sentence.

{documents}

What do the answers of the group have in common{contrast}? One sentence of at most 20 words:"""

Documents = Sequence[Mapping[str, Any]]


class DescribingError(AtomsteerError):
    """The server cannot be reached, or would refuse every atom. What was described is kept."""


class NoDescriptionError(AtomsteerError):
    """The server gave no description of one atom."""


@dataclass(frozen=True)
class Asking:
    """What is asked for: `documents` of the atom, and as many of others, are shown, and an answer may have `max_tokens`,
    thoughts included. `model` None: the only one that the server lists; `temperature` None: the server's own."""

    model: str | None = None
    documents: int = 6
    max_tokens: int = 512
    temperature: float | None = None


@dataclass(frozen=True)
class Described:
    """How it ended: the package as it is now, the ids of atoms that `model` described now, how many it had described before,
    and for others, by name, why it has not."""

    package: Package
    model: str
    done: tuple[str, ...]
    before: int
    failed: Mapping[str, str]


def describe_atoms(
    package: Package, server: str, key: str | None, asking: Asking, *, again: bool = False, progress: Progress | None = None
) -> Described:  # fmt: skip
    """Writes a description by a model of `server` into every card, each as it comes. Atoms that this model has described
    already are left alone unless `again`.

    Raises DataError for a package without documents, ConfigError for no URL or for a server of several models and none named,
    DescribingError, and PackageError if the package is replaced meanwhile.
    """
    evidence = {line["atom"]: _of_one_sign(line["documents"]) for line in package.evidence()}
    if not evidence:
        raise DataError(f"{package.path} holds no documents to describe atoms by; discover it without --no-documents")
    from openai import OpenAI

    with without_environment(OpenAI(base_url=_base(server), api_key=key or "none")) as client:
        asked = asking.model or _only_model(client)
        model = one_line(asked)
        cards = package.manifest.atoms
        pending = [card for card in cards if again or card.described_by != model]
        done: list[str] = []
        failed: dict[str, str] = {}

        def describe(card: AtomCard) -> None:
            nonlocal package
            try:
                said = _ask(client, asked, asking, _question(card.id, evidence, asking.documents))
            except NoDescriptionError as error:
                failed[card.name] = str(error)
            else:
                package = package.edit(card.id, description=said, described_by=model)
                done.append(card.id)

        try:
            with (progress or Progress()).task("describe", len(cards), "atoms", len(cards) - len(pending)) as bar:
                for card in pending:
                    describe(card)
                    bar.advance()
        except BaseException:
            with suppress(AtomsteerError):  # what ended the run is what must be told
                _report(package, done)
            raise
        _report(package, done)
    return Described(package, model, tuple(done), len(cards) - len(pending), failed)


def _report(package: Package, done: Sequence[str]) -> None:
    if done:
        write_report(package)


def _base(server: str) -> str:
    """The address of the API: /v1 of a server that is given without a path. Raises ConfigError for none of HTTP."""
    if urlsplit(server).scheme not in ("http", "https"):
        raise ConfigError(f"--server is {server!r}; it must begin with http:// or https://")
    return server if urlsplit(server).path.strip("/") else f"{server.rstrip('/')}/v1"


def _only_model(client: OpenAI) -> str:
    def listed() -> list[str]:
        return [model.id for model in client.models.list() if getattr(model, "parent", None) is None]

    try:
        names = _of_server(listed)
    except NoDescriptionError as error:
        raise DescribingError(f"{client.base_url} lists no models ({error}); name one with --model") from error
    if len(names) != 1 or not isinstance(names[0], str) or not one_line(names[0]):
        shown = ", ".join(map(str, names[:8])) or "none"
        raise ConfigError(f"{client.base_url} lists {len(names)} models ({shown}); name one with --model")
    return names[0]


def _ask(client: OpenAI, model: str, asking: Asking, question: str) -> str:
    """Raises NoDescriptionError, DescribingError."""
    from openai import omit

    def answered() -> tuple[object, str | None]:
        choice = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_completion_tokens=asking.max_tokens,
            temperature=omit if asking.temperature is None else asking.temperature,
        ).choices[0]  # fmt: skip
        return choice.message.content, choice.finish_reason

    content, ended = _of_server(answered)
    said = one_line(_THOUGHT.sub("", content, count=1)) if isinstance(content, str) else ""
    if ended == "length":
        whole = _SENTENCE.match(said)
        said = whole[0] if whole else ""
    if not said:
        cut = f" within --max-tokens ({asking.max_tokens})" if ended == "length" else ""
        raise NoDescriptionError(f"{model} said no sentence{cut}")
    return said


def _of_server(call: Callable[[], Any]) -> Any:
    """What the server answers. Raises NoDescriptionError for an answer that is none, DescribingError for no answer at all."""
    from openai import APIConnectionError, APIStatusError, OpenAIError

    try:
        return call()
    except APIStatusError as error:
        kind = DescribingError if error.status_code in _FATAL else NoDescriptionError
        raise kind(f"the server refused with {error.status_code}: {one_line(error.message)}") from error
    except APIConnectionError as error:
        raise DescribingError(f"the server cannot be reached ({error}); what was described is kept") from error
    except OpenAIError as error:
        raise NoDescriptionError(one_line(str(error))) from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise NoDescriptionError("the server answered something that is no answer of an OpenAI API") from error


def _of_one_sign(documents: Documents) -> Documents:
    """Those whose codes have the sign that carries more weight: with signed codes the others are the opposite."""
    towards = 1 if sum(document["code"] for document in documents) >= 0 else -1
    return [document for document in documents if document["code"] * towards > 0]


def _question(atom: str, evidence: Mapping[str, Documents], count: int) -> str:
    """The strongest documents of `atom`, and the strongest of other atoms that are not among those of `atom`."""
    own = evidence[atom]
    known, others = {_text(document) for document in own}, []
    for rank in range(max(map(len, evidence.values()))):
        for documents in evidence.values():
            if rank < len(documents) and (text := _text(documents[rank])) not in known:
                known.add(text)
                others.append(documents[rank])
    shown = [_shown("GROUP", own[:count]), *([_shown("OTHER", others[:count])] if others else [])]
    return _TASK.format(documents="\n\n".join(shown), contrast=" that the other answers lack" if others else "")


def _text(document: Mapping[str, Any]) -> tuple[str, str]:
    return document["prompt"], document["response"]


def _shown(title: str, documents: Documents) -> str:
    return "\n\n".join(
        f"{title}, question {n}: {_clip(document['prompt'])}\n{title}, answer {n}: {_clip(document['response'])}"
        for n, document in enumerate(documents, 1)
    )


def _clip(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 2] + " …"


def one_line(text: str) -> str:
    """`text` as plain text: printable characters, single blanks, no quotes around the whole, at most `LONGEST` characters."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    quotes = {plain[:1], _QUOTES.get(plain[:1], "")}
    if len(plain) > 1 and plain[-1] == _QUOTES.get(plain[0]) and not quotes & set(plain[1:-1]):
        plain = plain[1:-1].strip()
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 1].rstrip() + "…"
