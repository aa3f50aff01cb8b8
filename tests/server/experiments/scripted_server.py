"""A server process with a real database and socket whose engine recites a script: to be killed, or measured.

python scripted_server.py PACKAGE DATABASE_URL
"""

from __future__ import annotations

import sys
from pathlib import Path

from atoms.package import Package
from server.config import ServeConfig
from server.context import Traffic
from server.embedded.app import create_app
from server.embedded.scripted import ScriptedEngine
from server.embedded.serve import draining_server, reserve_port
from server.state import State
from server.store.schema import open_database


def main(path: str, url: str) -> None:
    package = Package.read(Path(path))
    state = State(open_database(url), package.manifest.name)
    engine, traffic = ScriptedEngine(slots=256, max_waiting=4096), Traffic()
    config = ServeConfig(package=package.path, admin_keys=("boss",), access_log=False)
    app = create_app(package, engine, config, traffic=traffic, state=state)
    with reserve_port("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        draining_server(app, engine, traffic, 5.0, f"serves on http://127.0.0.1:{port}").run(sockets=[listener])
    state.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
