"""Runs every code block of README.md, docs/ and the SDK's README as it is written, against a real server and package.

`make test` runs the blocks that take seconds, `make soak` also those below `<!-- soak -->`. A block that cannot run says
why in `<!-- not run: reason -->`, and NOT_RUN counts those, so that none slips by. A page's blocks run in order in a
directory of its own, where `demo/` has a package and its model and `documents.jsonl` are the demo's documents; what the shell
exports, and a server that it starts, last until the page ends. Only the port of the server is changed. `make demo` takes ten
minutes: ``ATOMSTEER_TEST_DEMO=demo`` gives it a copy of a demo that was made before, from which it goes on.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt

from atoms.package import Package
from clients.cli import app
from offline.shipped import shipped_file

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "clients" / "python" / "README.md"]
NODE_MODULES = ROOT / ".cache" / "node" / "node_modules"
SOAK = os.environ.get("ATOMSTEER_TEST_DOCS") == "all"
NOT_RUN = {
    "README.md": 2, "docs/atom-quality.md": 3, "docs/attribution.md": 1, "docs/discovery.md": 2, "docs/evaluation.md": 8, "docs/operations.md": 2, "docs/serving.md": 2,
    "docs/vllm.md": 2,
}  # fmt: skip
SHELLS = ("console", "bash", "sh")
FILES = {"python": "block.py", "javascript": "block.mjs"}
RUNTIMES = {"python": sys.executable, "javascript": "node"}
READ_ONLY = ("text", "json", "jsonc", "yaml", "promql")
SECONDS = 3600 if SOAK else 240
MARK = re.compile(r"<!-- (soak|not run: .+) -->")
COMMAND = re.compile(r"^(\$|atomsteer|curl|docker|kubectl|make|pip|python|torchrun) ", re.MULTILINE)
PORT = "8000"
PRELUDE = """
set -euo pipefail
if [ -f .exported ]; then . ./.exported; fi
trap 'export -p > .exported' EXIT
curl() { command curl --fail-with-body --silent --show-error "$@"; }
make() { command make -C "$ROOT" DEMO="$PWD/made" "$@"; }
atomsteer() {
    if [ "$1" != serve ]; then command atomsteer "$@"; return; fi
    [ ! -f server.pid ] || { echo "the page starts a second server"; return 1; }
    command atomsteer "$@" --port "$PORT" > server.log 2>&1 & echo $! > server.pid
    until grep -q ' serves .* on http' server.log; do kill -0 $! || { cat server.log; return 1; }; sleep 0.1; done
}
"""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    code: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    found = []
    for before, token in zip([None, *tokens], tokens):
        if token.type in ("fence", "code_block"):
            mark = MARK.fullmatch(before.content.strip()) if before and before.type == "html_block" else None
            place = page.relative_to(ROOT).as_posix()
            found.append(Block(place, token.map[0] + 1, token.info, token.content, mark[1] if mark else ""))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [
    block for block in BLOCKS
    if block.language in (*SHELLS, *FILES) and (block.mark == "" or (SOAK and block.mark == "soak"))
]  # fmt: skip


def test_no_block_escapes() -> None:
    for block in BLOCKS:
        known = (*SHELLS, *FILES, *READ_ONLY)
        assert block.language in known, f"{block}: {block.language!r} is none of {', '.join(known)}"
        assert block.language not in READ_ONLY or not COMMAND.search(block.code), f"{block} has a command in it"
    skipped = [block.page for block in BLOCKS if block.mark.startswith("not run")]
    assert {page: skipped.count(page) for page in skipped} == NOT_RUN


def inline_code() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
            for child in token.children or []:
                if child.type == "code_inline":
                    yield page.name, child.content.split()


def test_commands_in_running_text_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = 0
    for page, words in inline_code():
        if words[:1] == ["make"] and len(words) > 1:
            assert words[1] in targets, f"{page}: there is no target {words[1]}"
        elif words[:2] == ["python", "-m"] or (words[:1] == ["python"] and words[1].endswith(".py")):
            script = ROOT / (words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1])
            source = script.read_text()
            names = [option.removeprefix("--") for option in options(words)]
            assert all(f"--{name}" in source or f'"{name}"' in source for name in names), f"{page}: {' '.join(words)}"
        elif words[:1] == ["atomsteer"] and len(words) > 1:
            command = typer.main.get_command(app)
            for word in words[1:]:
                if word not in getattr(command, "commands", {}):
                    break
                command = command.commands[word]
            assert command.name != app.info.name, f"{page}: there is no command {words[1]}"
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            assert set(options(words)) <= known, f"{page}: {' '.join(words)}"
        else:
            continue
        seen += 1
    assert seen > 20


def options(words: list[str]) -> list[str]:
    before_foreign = words[: words.index("--")] if "--" in words else words
    return [word.split("=")[0].rstrip(",.") for word in before_foreign if word.startswith("--")]


@dataclass(frozen=True)
class Page:
    """Where the blocks of a page run, and the port of the server that they talk to."""

    directory: Path
    port: str


@pytest.fixture(scope="module")
def page(
    request: pytest.FixtureRequest, named_package: Package, smol_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    directory = tmp_path_factory.mktemp("docs")
    shutil.copytree(named_package.path, directory / "demo" / "package")
    (directory / "demo" / "model").mkdir()
    (directory / "demo" / "model" / smol_path.name).symlink_to(smol_path)
    shutil.copy(shipped_file("demo_documents"), directory / "documents.jsonl")
    if made := os.environ.get("ATOMSTEER_TEST_DEMO"):
        shutil.copytree(ROOT / made, directory / "made", symlinks=True)
    for name in ("bench", "clients", "offline"):
        (directory / name).symlink_to(ROOT / name)
    if NODE_MODULES.exists():
        (directory / "node_modules").symlink_to(NODE_MODULES)
    if any("atomsteer serve" in block.code for block in RUN if block.page == request.param):
        port = free_port()
    else:
        port = re.search(r":(\d+)", request.getfixturevalue("real_server"))[1]
    yield Page(directory, port)
    if (directory / "server.pid").exists():
        stop_as_a_user_would(int((directory / "server.pid").read_text()), directory / "server.log")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def stop_as_a_user_would(pid: int, log: Path) -> None:
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists() and "Traceback" not in log.read_text(), log.read_text()


@pytest.mark.parametrize(
    ("page", "block"), [(block.page, block) for block in RUN], indirect=["page"], ids=map(str, RUN), scope="module"
)
def test_a_block_runs_as_it_is_written(page: Page, block: Block) -> None:
    code = block.code.replace(f"127.0.0.1:{PORT}", f"127.0.0.1:{page.port}").replace(f"--port {PORT}", "")
    if block.language in SHELLS:
        command = ["bash", "-c", PRELUDE + typed_at_prompts(code)]
    else:
        (page.directory / FILES[block.language]).write_text(code, encoding="utf-8")
        command = [RUNTIMES[block.language], FILES[block.language]]
        if block.language == "javascript" and needs_node():
            pytest.skip("Node.js is not installed")
    url = f"http://127.0.0.1:{page.port}"
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ROOT": str(ROOT), "PORT": page.port,
        "ATOMSTEER_BASE_URL": f"{url}/v1", "ATOMSTEER_SERVER": url, "COLUMNS": "120",
    }  # fmt: skip
    done = subprocess.run(
        command, cwd=page.directory, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
    )  # fmt: skip
    assert done.returncode == 0, f"{block}\n{code}\n{done.stdout}\n{done.stderr}"


def typed_at_prompts(code: str) -> str:
    """The lines after a prompt where the block shows a session, else all of it."""
    prompts = re.findall(r"^\$ (.*(?:\\\n.*)*)", code, re.MULTILINE)
    return "\n".join(prompts) or code


def needs_node() -> bool:
    """Whether the machine lacks Node; on CI, where it may not, the block runs and fails."""
    return shutil.which("node") is None and "CI" not in os.environ
