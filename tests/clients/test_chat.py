"""`atomsteer chat` with its input from a pipe."""

from __future__ import annotations

import subprocess
import sys

from atoms.package import Package


def chat(lines: list[str], *arguments: object) -> tuple[list[str], str]:
    """Lines of standard output, and standard error."""
    command = [
        sys.executable,
        "-m",
        "clients.cli",
        "chat",
        *map(str, arguments),
        "--temperature",
        "0",
        "--max-tokens",
        "6",
    ]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_a_piped_conversation_prints_answers_and_obeys_commands(real_server: str, named_package: Package) -> None:
    asked = "Name a fruit."
    out, errors = chat(
        [asked, "/mix bulleted-list=3", "/mix", "/reset", asked, "/compare " + asked, "/mix nope=1", "/atoms", "/what",
         "/mix none", "/reset", asked, "/quit", "never read"],
        "--server", real_server,
    )  # fmt: skip
    kl = named_package.predicted_kl(named_package.mix({"bulleted-list": 3.0}))
    assert f"[bulleted-list=3; predicted KL {kl:.3f} nats a token]" in errors
    assert "unknown atom 'nope'" in errors and "'/what' is no command" in errors
    assert all(card.name in errors for card in named_package.manifest.atoms)
    plain, steered, compared_plain, compared_steered, last = out
    assert plain == compared_plain == last, "the same question without steering, after a reset, has the same answer"
    assert steered == compared_steered
    assert "never read" not in errors
