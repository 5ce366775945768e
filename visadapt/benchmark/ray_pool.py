"""Cells as tasks of a Ray cluster, which may be this machine alone."""

from __future__ import annotations

import logging
import math
import os
import platform
import socket
import warnings
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError, Notice, counted
from .cells import Cell
from .local_pool import SAID, attempt, reason, told
from .sweep import Outcome

FORMS = "'local', 'auto', host:port or ray://host:port"
PATIENCE = 10
"""Seconds in which the port of a cluster must answer."""

PLACES = ("VISADAPT_DATA", "VISADAPT_CACHE")
"""Environment variables that tell where files are; a worker has those of the sweep, not those of its node."""


class RayPool:
    """Processes anywhere in a Ray cluster that each run one cell.

    Every node must have this package installed in the version of the sweep, and the folder in which the sweep was
    started under the same path, such as on a shared disk: relative paths are seen from there. The line of a cell comes
    back to the sweep; its run stays on the disk of the node.

    Args:
        address: "local" starts Ray on this machine for the time of the sweep; "auto" (a cluster on this machine, or
            that of RAY_ADDRESS), "host:port" and "ray://host:port" are clusters that are running.
        workers: cells at a time.
        threads: of each of them, and CPUs that it takes. It takes a GPU too where the cluster has any.

    Raises:
        InputError: Ray is not installed, no cluster answers, or none of its nodes is large enough for a cell.
    """

    def __init__(self, address: str, workers: int, threads: int) -> None:
        self.address, self.workers, self.threads = address, workers, threads
        self.ray = _ray(address)
        self.running: dict[Any, tuple[Cell, Path]] = {}  # by the reference to the result
        self._connect()

    def submit(self, cell: Cell, folder: Path) -> None:
        """Begin with a cell; a pool that was closed opens again."""
        if not self.ray.is_initialized():
            self._connect()
        reference = self.task.remote(cell, folder, self.threads, os.getcwd(), _identity(cell))
        self.running[reference] = (cell, folder)

    def wait(self, seconds: float) -> list[tuple[Cell, Outcome]]:
        """Cells that have ended."""
        ended, _ = self.ray.wait(list(self.running), num_returns=1, timeout=seconds)
        pairs = [(reference, *self.running.pop(reference)) for reference in ended]
        return [(cell, self._outcome(reference, folder)) for reference, cell, folder in pairs]

    def close(self) -> None:
        """Stop what runs, and a Ray of our own."""
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        self.running = {}
        self.ray.shutdown()

    def _connect(self) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        places = {"env_vars": {name: os.environ.get(name, "") for name in PLACES}}
        if self.address == "local":
            size = {"num_cpus": self.workers * self.threads, "object_store_memory": 100 * 2**20}  # results are short
            self.ray.init("local", include_dashboard=False, runtime_env=places, **size, **quiet)
        else:
            _knock(self.address)
            try:
                self.ray.init(self.address, runtime_env=places, **quiet)
            except (OSError, RuntimeError, ValueError, self.ray.exceptions.RayError) as error:
                if self.address == "auto" and isinstance(error, ConnectionError) and not os.environ.get("RAY_ADDRESS"):
                    more = "start one with 'ray start --head', or give --ray local"
                    raise InputError(f"no Ray cluster on this machine; {more}") from error
                token = "; if it asks for a token, set RAY_AUTH_MODE=token" * self.address.startswith("ray://")
                raise InputError(
                    f"no Ray cluster at '{self.address}': {' '.join(str(error).split())}{token}"
                ) from error
        gpus = self._fit()
        self.task = self.ray.remote(max_calls=1, max_retries=0, num_cpus=self.threads, num_gpus=gpus)(work)

    def _fit(self) -> int:
        """Run no more cells at a time than the cluster has room for.

        Returns:
            GPUs of each cell.
        """
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus = int(any(node.get("GPU") for node in nodes))
        room = [min(node.get("CPU", 0) // self.threads, node.get("GPU", 0) if gpus else math.inf) for node in nodes]
        slots = int(sum(room))
        if not slots:
            self.ray.shutdown()
            needed = counted(self.threads, "CPU") + " and a GPU" * gpus
            raise InputError(f"no node of the Ray cluster '{self.address}' has {needed}, which --threads asks for")
        if slots < self.workers:
            text = f"the Ray cluster '{self.address}' has room for {counted(slots, 'cell')} at a time"
            warnings.warn(Notice(f"{text}, not for {self.workers}"), stacklevel=3)
            self.workers = slots
        return gpus

    def _outcome(self, reference: Any, folder: Path) -> Outcome:
        """How a task ended: by itself, or with its process or node.

        Raises:
            InputError: the cluster is gone, and no other cell could run.
        """
        errors = self.ray.exceptions
        try:
            return told(self.ray.get(reference), folder)
        except errors.RayTaskError as error:  # it did not come as far as to the cell
            return Outcome(error=reason(error.cause))
        except (errors.RuntimeEnvSetupError, errors.TaskUnschedulableError) as error:
            return Outcome(error=reason(error))
        except errors.LocalRayletDiedError as error:
            again = "start one and run the command again: what has ended is stored"
            raise InputError(f"the Ray cluster '{self.address}' is gone; {again}") from error
        except errors.RayError as error:
            why = reason(error).partition(". ")[0]  # a long text about Ray follows
            return Outcome(error=f"its worker is gone, {why} (see {folder / SAID})", killed=True)


def work(cell: Cell, folder: Path, threads: int, home: str, identity: tuple[str, str]) -> dict[str, Any]:
    """The task: run a cell as the sweep means it, in a process that ends with it.

    Returns:
        see `attempt`.
    """
    node = platform.node()
    try:
        os.chdir(home)
    except OSError:
        return {"error": f"{node} has no folder {home}, where the sweep runs; put it on a disk that all nodes share"}
    if _identity(cell) != identity:
        return {"error": f"visadapt on {node} is another one than the sweep's; install the same on all nodes"}
    return attempt(cell, folder, threads)


def _identity(cell: Cell) -> tuple[str, str]:
    """What a stored line is found by: two versions of the package do not agree about it."""
    return cell.key, __version__


def _ray(address: str) -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    if address != "local":
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # 40 s each, where something else has the port
    try:
        import ray
    except ModuleNotFoundError as error:
        raise InputError("sweeps on a cluster need Ray: pip install 'visadapt[ray]'") from error
    return ray


def _knock(address: str) -> None:
    """See that somebody listens at an address; Ray itself would try for many minutes.

    Raises:
        InputError: it is no address, or nobody does.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "auto":  # a cluster on this machine, which Ray finds or not at once
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"'{address}' is no address of a Ray cluster; it is {FORMS}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        raise InputError(f"no Ray cluster at '{address}': {error}; start one with 'ray start --head'") from error
