"""`chat`: a conversation in the terminal, whose mix can be changed between turns.

Lines that begin with a slash are commands; all others are the user's turns. Answers go to standard output, everything
else to standard error when the input is no terminal, so that a piped conversation prints its answers alone. Line editing,
history and completion are in `terminal.py`.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from atoms.errors import AtomsteerError
from atoms.mix import mix_text, parse_mix
from clients.connection import Connection, connect
from clients.plain_openai import without_environment
from clients.terminal import line_reader

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from server.embedded.load import EngineOptions

COLUMN_WIDTH = 40
"""Least width of a column in which an answer can be read."""
COMMANDS = ("/mix", "/atoms", "/compare", "/history", "/reset", "/help", "/quit")
HELP = """\
/mix [a=2,b=-1]   show the mix, or set it; "/mix none" answers unsteered
/atoms            list the atoms of the server
/compare [TEXT]   answer TEXT, or the last question again, unsteered and with the mix, from one seed; not kept
/history          show the conversation
/reset            forget the conversation
/help             this list
/quit             leave (or end of input)"""


class NoCommandError(AtomsteerError):
    """A line with a slash that is no command."""


class SteeringMissingError(AtomsteerError):
    """The server answered without an echo: it does not steer."""


class ChatStartError(AtomsteerError):
    """The server refused what a chat begins with."""


@dataclass
class Chat:
    """One conversation. `sampling` are the fields of a request besides model, messages and steering; `failed` counts turns and
    commands that ended with an error."""

    client: AsyncOpenAI
    model: str
    sampling: dict[str, Any]
    system: str | None = None
    mix: dict[str, float] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)
    atoms: list[str] = field(default_factory=list)
    """Names of the server's atoms, for completion."""
    failed: int = 0

    async def say(self, text: str) -> None:
        """Streams the answer to `text` and keeps both turns; a turn that fails or is interrupted is not kept."""
        answer = await self._stream([*self.turns, {"role": "user", "content": text}], self.mix, self.sampling)
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    async def compare(self, text: str) -> None:
        """Answers `text` alone, or the last question where it was asked, unsteered and with the mix, from the same seed."""
        messages = [{"role": "user", "content": text}] if text else self.turns[:-1]
        if not messages:
            raise NoCommandError("there is no question to compare yet; ask one, or give /compare a TEXT")
        sampling = {"seed": secrets.randbelow(1 << 31)} | self.sampling
        columns = {"unsteered": {}, self.described(): self.mix}
        if len(columns) == 1:
            raise NoCommandError("the mix is empty, so both answers would be the same; set one with /mix")
        if not sys.stdout.isatty() or Console().width < COLUMN_WIDTH * len(columns):
            for title, mix in columns.items():
                notice(f"[{title}]")
                await self._stream(messages, mix, sampling)
            return
        answers = await asyncio.gather(*(self._whole(messages, mix, sampling) for mix in columns.values()))
        table = Table(expand=True)
        for title in columns:
            table.add_column(Text(title), ratio=1, overflow="fold")
        table.add_row(*map(Text, answers))
        Console().print(table)

    def show_history(self) -> None:
        for turn in self.turns:
            notice(f"{turn['role']}: {turn['content']}")

    async def set_mix(self, text: str) -> None:
        """Takes the mix if the server does; the old one stays otherwise."""
        mix = {} if text == "none" else parse_mix([text])
        echo = await self.client.post("/steering/preview", body={"steering": {"atoms": mix}}, cast_to=dict[str, Any])
        self.mix = mix
        notice(f"[{self.described()}; predicted KL {echo['steering']['predicted_kl']:.3f} nats a token]")

    async def show_atoms(self) -> None:
        for atom in await self.list_atoms():
            low, high = atom["sound_range"] or atom["tested_range"]
            notice(f"{atom['name']:<24} {low:g} … {high:g}  {' '.join(atom['keywords'][:6])}")

    async def list_atoms(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.client.get("/atoms", cast_to=dict[str, Any]))["data"]
        self.atoms = [atom["name"] for atom in found]
        return found

    def completions(self, line: str) -> list[str]:
        """What the last word of `line` may go on to: commands, or after ``/mix`` the names of atoms."""
        *before, word = line.split(" ")
        if not before:
            return [f"{command} " for command in COMMANDS if word.startswith("/") and command.startswith(word)]
        if before != ["/mix"]:
            return []
        done, comma, name = word.rpartition(",")
        return [f"{done}{comma}{atom}=" for atom in self.atoms if atom.startswith(name)]

    def described(self) -> str:
        return mix_text(self.mix, ", ")

    async def _ask(
        self, messages: list[dict[str, str]], mix: dict[str, float], sampling: dict[str, Any], **more: Any
    ) -> Any:
        """The raw answer. Raises SteeringMissingError."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked: Any = [*system, *messages]
        raw = await self.client.chat.completions.with_raw_response.create(
            model=self.model, messages=asked, extra_body={"steering": {"atoms": mix}}, **sampling, **more
        )
        if "x-atomsteer-mix" not in raw.headers:
            raise SteeringMissingError("the server ignores steering; is it an atomsteer server?")
        return raw.parse()

    async def _whole(self, messages: list[dict[str, str]], mix: dict[str, float], sampling: dict[str, Any]) -> str:
        return (await self._ask(messages, mix, sampling)).choices[0].message.content or ""

    async def _stream(self, messages: list[dict[str, str]], mix: dict[str, float], sampling: dict[str, Any]) -> str:
        """Prints an answer as it comes."""
        stream = await self._ask(messages, mix, sampling, stream=True)
        pieces: list[str] = []
        try:
            async for chunk in stream:
                if chunk.choices and (text := chunk.choices[0].delta.content):
                    pieces.append(text)
                    print(text, end="", flush=True)
        finally:
            await stream.close()
            print(flush=True)
        return "".join(pieces)

    async def obey(self, line: str) -> bool:
        """Does what a command says; False to leave. Raises NoCommandError, and what the command raises."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("quit", "exit"):
            return False
        if name == "mix":
            await self.set_mix(rest) if rest else notice(f"[{self.described()}]")
        elif name == "atoms":
            await self.show_atoms()
        elif name == "compare":
            await self.compare(rest)
        elif name == "history":
            self.show_history()
        elif name == "reset":
            self.turns.clear()
            notice("[the conversation is forgotten]")
        elif name == "help":
            notice(HELP)
        else:
            raise NoCommandError(f"{line[:40]!r} is no command; /help lists them")
        return True


def run_chat(
    *,
    package: Path | None,
    server: str | None,
    key: str | None,
    mix: list[str],
    system: str | None,
    sampling: dict[str, Any],
    options: EngineOptions | None,
) -> int:
    """Talks until the input ends; returns how many turns and commands failed. Their errors are shown, and the talk goes on.

    Raises what `connect` raises, MixError, ChatStartError.
    """
    with connect(package, server, key, options) as connection, asyncio.Runner() as runner:
        return _talk(runner, connection, mix, system, sampling)


def _talk(
    runner: asyncio.Runner, connection: Connection, mix: list[str], system: str | None, sampling: dict[str, Any]
) -> int:
    from openai import AsyncOpenAI

    client = without_environment(AsyncOpenAI(base_url=connection.url, api_key=connection.key))
    chat = Chat(client, connection.model, sampling, system)
    try:
        _begin(runner, chat, mix)
        read = line_reader(chat.completions)
        while (line := read()) is not None:
            if line.strip() and not _turn(runner, chat, line.strip()):
                break
    finally:
        runner.run(chat.client.close())
    return chat.failed


def _begin(runner: asyncio.Runner, chat: Chat, mix: list[str]) -> None:
    """Sets the mix, and learns the names of atoms where there is somebody to complete them for."""
    from openai import OpenAIError

    try:
        if mix:
            runner.run(chat.set_mix(",".join(mix)))
        if sys.stdin.isatty():
            runner.run(chat.list_atoms())
            notice("/help lists the commands")
    except OpenAIError as error:
        raise ChatStartError(f"{chat.client.base_url} refused: {getattr(error, 'message', error)}") from error


def _turn(runner: asyncio.Runner, chat: Chat, line: str) -> bool:
    """Answers one line; False to leave. Ctrl-C stops the answer alone."""
    from httpx2 import HTTPError
    from openai import OpenAIError

    try:
        if line.startswith("/"):
            return runner.run(chat.obey(line))
        runner.run(chat.say(line))
    except KeyboardInterrupt:
        notice("[stopped]")
    except (AtomsteerError, OpenAIError, HTTPError) as error:  # the last is a stream that breaks off
        chat.failed += 1
        notice(f"error: {getattr(error, 'message', error)}")
    return True


def notice(text: str) -> None:
    print(text, file=sys.stdout if sys.stdin.isatty() else sys.stderr, flush=True)
