"""Starting several processes of one run, and ending them."""

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def started(
    command: list[str], places: int | None = 2, processes: int | None = None, **options: Any
) -> list[subprocess.Popen]:
    """Start a command in two processes that find each other, or once (a launcher).

    ``processes``: start only so many of the places; a command that forks makes the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(processes or places or 1):
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'taxonomy'}", "OMP_NUM_THREADS": "1"}
        env |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
        if places:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": places, "MASTER_PORT": port}
            env |= {name: str(value) for name, value in place.items()}
            env["MASTER_ADDR"] = "127.0.0.1"
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        workers.append(subprocess.Popen(command, env=env, **options))
    return workers


def ended(workers: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each; whoever is left when the time is up is killed."""
    try:
        found = []
        for worker in workers:
            printed, errors = worker.communicate(timeout=timeout)
            found.append((worker.returncode, printed, errors))
        return found
    finally:
        stop(workers)


def stop(workers: list[subprocess.Popen]) -> None:
    """Kill who still runs, wait for all, close their pipes."""
    for worker in workers:
        with worker:
            worker.kill()
