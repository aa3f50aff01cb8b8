"""Lines that a user types: edited, completed, and remembered between runs, by readline where the machine has it."""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Callable

_REMEMBERED_LINES = 1000


def line_reader(completions: Callable[[str], list[str]]) -> Callable[[], str | None]:
    """Gives the next line, None at the end of the input.

    `completions(line)` are the words that the last word of `line` may become, words being set apart by spaces. Where the
    input is no terminal there are no prompts, no completion, and nothing is remembered.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        _set_up(completions)

    def read() -> str | None:
        try:
            return input("> " if terminal else "")
        except EOFError:
            return None
        except KeyboardInterrupt:  # at a prompt, Ctrl-C drops what was typed
            print()
            return ""

    return read


def _set_up(completions: Callable[[str], list[str]]) -> None:
    try:
        import readline
    except ImportError:  # not on Windows: there is no line editing then
        return
    from platformdirs import user_state_path

    def complete(word: str, place: int) -> str | None:
        found = completions(readline.get_line_buffer()[: readline.get_endidx()])
        return found[place] if place < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    readline.set_auto_history(True)
    path = user_state_path("atomsteer", appauthor=False, ensure_exists=True) / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_REMEMBERED_LINES)

    def save() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

    atexit.register(save)
