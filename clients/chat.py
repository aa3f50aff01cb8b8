"""`chat`: a conversation in the terminal, whose mix can be changed between turns.

Lines that begin with a slash are commands; all others are the user's turns. Answers go to standard output, everything
else to standard error when the input is no terminal, so that a piped conversation prints its answers alone.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoms.errors import AtomsteerError
from atoms.mix import parse_mix
from clients.connection import Connection, connect
from server.embedded.load import EngineOptions

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_HISTORY_LINES = 1000
HELP = """\
/mix [a=2,b=-1]   show the mix, or set it; "/mix none" answers unsteered
/atoms            list the atoms of the server
/compare TEXT     answer TEXT without steering and with the mix, outside the conversation
/reset            forget the conversation
/help             this list
/quit             leave (or end of input)"""


class NoCommandError(AtomsteerError):
    """A line with a slash that is no command."""


class SteeringMissingError(AtomsteerError):
    """The server answered without an echo: it does not steer."""


@dataclass
class Chat:
    """One conversation. `sampling` are the fields of a request besides model, messages and steering."""

    client: AsyncOpenAI
    model: str
    sampling: dict[str, Any]
    system: str | None = None
    mix: dict[str, float] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)

    async def say(self, text: str) -> None:
        """Streams the answer to `text` and keeps both turns; a turn that fails or is interrupted is not kept."""
        answer = await self._stream([*self.turns, {"role": "user", "content": text}], self.mix)
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    async def compare(self, text: str) -> None:
        """Answers `text` alone, unsteered and with the mix."""
        for title, mix in (("unsteered", {}), (self.described(), self.mix)):
            notice(f"[{title}]")
            await self._stream([{"role": "user", "content": text}], mix)

    async def set_mix(self, text: str) -> None:
        """Takes the mix if the server does; the old one stays otherwise."""
        mix = {} if text == "none" else parse_mix([text])
        echo = await self.client.post("/steering/preview", body={"steering": {"atoms": mix}}, cast_to=dict[str, Any])
        self.mix = mix
        notice(f"[{self.described()}; predicted KL {echo['steering']['predicted_kl']:.3f} nats a token]")

    async def show_atoms(self) -> None:
        for atom in (await self.client.get("/atoms", cast_to=dict[str, Any]))["data"]:
            low, high = atom["sound_range"] or atom["tested_range"]
            notice(f"{atom['name']:<24} {low:g} … {high:g}  {' '.join(atom['keywords'][:6])}")

    def described(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self.mix.items()) or "unsteered"

    async def _stream(self, messages: list[dict[str, str]], mix: dict[str, float]) -> str:
        """Prints an answer as it comes. Raises SteeringMissingError before anything is printed."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked: Any = [*system, *messages]
        stream: Any = await self.client.chat.completions.create(
            model=self.model, messages=asked, stream=True, extra_body={"steering": {"atoms": mix}}, **self.sampling
        )  # fmt: skip
        if "x-atomsteer-mix" not in stream.response.headers:
            await stream.close()
            raise SteeringMissingError("the server ignores steering; is it an atomsteer server?")
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
        elif name == "compare" and rest:
            await self.compare(rest)
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
    options: EngineOptions,
) -> None:
    """Talks until the input ends. Raises what `connect` raises; errors of single turns are shown, and the talk goes on."""
    with connect(package, server, key, options) as connection, asyncio.Runner() as runner:
        _talk(runner, connection, mix, system, sampling)


def _talk(
    runner: asyncio.Runner, connection: Connection, mix: list[str], system: str | None, sampling: dict[str, Any]
) -> None:
    from openai import AsyncOpenAI

    chat = Chat(AsyncOpenAI(base_url=connection.url, api_key=connection.key), connection.model, sampling, system)
    try:
        if mix:
            runner.run(chat.set_mix(",".join(mix)))
        read = _reader()
        while (line := read()) is not None:
            if line.strip() and not _turn(runner, chat, line.strip()):
                break
    finally:
        runner.run(chat.client.close())


def _turn(runner: asyncio.Runner, chat: Chat, line: str) -> bool:
    """Answers one line; False to leave. Ctrl-C stops the answer alone."""
    from openai import OpenAIError

    try:
        if line.startswith("/"):
            return runner.run(chat.obey(line))
        runner.run(chat.say(line))
    except KeyboardInterrupt:
        notice("[stopped]")
    except (AtomsteerError, OpenAIError) as error:
        notice(f"error: {getattr(error, 'message', error)}")
    return True


def notice(text: str) -> None:
    print(text, file=sys.stdout if sys.stdin.isatty() else sys.stderr, flush=True)


def _reader() -> Callable[[], str | None]:
    """Gives the next line, None at the end. At a terminal with line editing, and with history kept between runs."""
    terminal = sys.stdin.isatty()
    if terminal:
        _keep_history()
        notice("/help lists the commands")

    def read() -> str | None:
        try:
            return input("> " if terminal else "")
        except EOFError:
            return None

    return read


def _keep_history() -> None:
    try:
        import readline
    except ImportError:  # not on Windows: there is no line editing then
        return
    import atexit
    import contextlib

    from platformdirs import user_state_path

    path = user_state_path("atomsteer", appauthor=False, ensure_exists=True) / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)

    def save() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

    atexit.register(save)
