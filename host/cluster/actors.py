"""Shards in actors of Ray: each opens a device where it runs, on any machine of a Ray cluster."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from moeaccel.config import AcceleratorConfig
from moeaccel.errors import MoeAccelError, ToolMissingError
from moeaccel.host.cluster.cluster import Cluster
from moeaccel.host.cluster.shard import Floats, Pairs, Routed, Shard, Worker
from moeaccel.host.errors import (
    DeviceClosed,
    InvalidOption,
    LinkLost,
    ShardLost,
    ShardUnplaced,
)
from moeaccel.host.opening import open_device
from moeaccel.host.routing import Router

__all__ = ["RayShard", "ray_cluster"]


class _Raised(NamedTuple):
    """An error of ours, as it travels: some take more than a message to be made."""

    kind: type[MoeAccelError]
    arguments: tuple[Any, ...]
    state: dict[str, Any]

    @classmethod
    def of(cls, error: MoeAccelError) -> Self:
        """Return an error, ready to travel."""
        return cls(type(error), error.args, error.__dict__)

    def again(self) -> MoeAccelError:
        """Return the error."""
        error = self.kind.__new__(self.kind, *self.arguments)
        error.args = self.arguments
        error.__dict__.update(self.state)
        return error


class _Actor:
    """Has a device, and does what a worker does."""

    def __init__(self, spec: str, options: dict[str, Any]) -> None:
        self._spec, self._options = spec, options
        self._worker: Worker | None = None

    def where(self) -> tuple[int, str]:
        """Return its process and machine."""
        return os.getpid(), os.uname().nodename

    def open(self) -> AcceleratorConfig | _Raised:
        """Open the device, and return its configuration."""
        try:
            self._worker = Worker(open_device(self._spec, **self._options))
        except MoeAccelError as error:
            return _Raised.of(error)
        return self._worker.device.config

    def ask(self, what: str, *arguments: Any) -> Any:
        """Do it, and return what came of it, or the error."""
        try:
            found = getattr(self._worker, what)(*arguments)
            return found() if callable(found) else found
        except MoeAccelError as error:
            return _Raised.of(error)


class RayShard(Shard):
    """A device of an actor, which opens it while others open theirs: :meth:`wait` for it.

    Parameters
    ----------
    ray
        The package.
    number : :class:`int`
    spec : :class:`str`
        See :func:`moeaccel.host.open_device`.
    options : mapping
        Of the same.
    placement : mapping
        Options of the actor: ``resources``, ``num_cpus``, ``scheduling_strategy``, ...
    """

    def __init__(self, ray: Any, number: int, spec: str, options: Mapping[str, Any],
                 placement: Mapping[str, Any]) -> None:
        self._ray, self._number = ray, number
        self.name = f"{number}, {spec!r}"
        self._placement = {"num_cpus": 1} | dict(placement)
        self._actor = ray.remote(**self._placement)(_Actor).remote(spec, dict(options))
        self._placed, self._opened = self._actor.where.remote(), self._actor.open.remote()
        self._driver = ray.get_runtime_context().get_worker_id()
        self.process = 0

    def wait(self, end: float) -> None:
        """Wait until it has a place, or the clock says so, and until its device is open.

        Raises
        ------
        ShardUnplaced
            If Ray has no place for the actor.
        ShardLost
            If it ended meanwhile.
        """
        ready, _ = self._ray.wait([self._placed], timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise ShardUnplaced(
                f"shard {self.name} must start where Ray has {self._placement} free, but did not "
                "in start_timeout=; `ray status` says what machines have: add one, or give "
                "another placement=")
        try:
            self.process, machine = self._taken(self._placed)
            self.name += f" in process {self.process} on {machine}"
            self.config = self._taken(self._opened)
        except LinkLost as error:
            raise ShardLost(f"shard {self.name} must start, but is lost: {error}",
                            self._number) from error
        except MoeAccelError as error:
            error.add_note(f"raised by shard {self.name}")
            raise

    def _taken(self, reference: Any) -> Any:
        """Return what an actor answers."""
        errors = self._ray.exceptions
        try:
            found = self._ray.get(reference)
        except (errors.RayActorError, errors.ActorUnschedulableError, errors.NodeDiedError,
                errors.LocalRayletDiedError, errors.ObjectLostError,
                errors.RuntimeEnvSetupError) as error:
            raise LinkLost(_in_a_line(error)) from error
        if isinstance(found, _Raised):
            raise found.again()
        return found

    @property
    def _there(self) -> bool:
        """Whether Ray is still the one that has the actor: asked after its end, it would start
        another."""
        return (self._ray.is_initialized()
                and self._ray.get_runtime_context().get_worker_id() == self._driver)

    def _ask(self, *arguments: Any) -> Callable[[], Any]:
        if not self._there:
            raise DeviceClosed("Ray was shut down, and the actor ended with it")
        reference = self._actor.ask.remote(*arguments)
        return lambda: self._taken(reference)

    def load(self, key: int, gate_up: Sequence[Floats], down: Sequence[Floats],
             options: dict[str, Any]) -> Callable[[], None]:
        return self._ask("load", key, gate_up, down, options)

    def submit(self, key: int, pairs: Pairs) -> Callable[[], Floats]:
        return self._ask("submit", key, pairs)

    def load_router(self, key: int, router: Router) -> Callable[[], None]:
        return self._ask("load_router", key, router)

    def route(self, key: int, x: Floats) -> Callable[[], Routed]:
        return self._ask("route", key, x)

    def drop(self, key: int) -> None:
        """Let it free experts, or a router; nobody waits for that."""
        self._ask("drop", key)

    def close(self) -> None:
        """End the actor, and its device with it."""
        if self._there:
            self._ray.kill(self._actor)


def _in_a_line(error: Exception) -> str:
    """Return what an error of Ray's says, without lists of identifiers and of what may be."""
    return " ".join(line.strip() for line in str(error).splitlines()
                    if line and not line[0].isspace()).split(" Some common causes")[0].rstrip(".")


def ray_cluster(specs: Sequence[str], *, on_loss: str = "error",
                placement: Sequence[Mapping[str, Any]] | None = None,
                start_timeout: float = 60.0, **options: Any) -> Cluster:
    """Open a device in an actor of Ray for each specification, and return them as a cluster.

    Ray is initialised before (``ray.init(address="auto")`` where ``ray start`` has joined several
    machines, each with this package), or here, on this machine alone, with a CPU for each.

    Parameters
    ----------
    specs : sequence of :class:`str`
        ``"golden"``, ``"rtl"``, ``"xdma:0"``, ...: what the actor opens on its machine.
    on_loss
        See :class:`Cluster`.
    placement : sequence of mappings, optional
        Ray's options of each actor, which decide on which machine it runs; it asks for one CPU
        where ``num_cpus`` does not say otherwise.
    start_timeout : :class:`float`
        Seconds until Ray has found places for all. Devices may take longer to open, as models that
        have to be built.
    **options
        ``config``, ``memory_bytes`` and others of :func:`moeaccel.host.open_device`.

    Raises
    ------
    ToolMissingError
        If Ray is not installed.
    InvalidOption
        If there are no specifications, or placements of other devices.
    ShardUnplaced
        If Ray has no place for an actor.
    ShardLost
        If an actor ends before its device is open. What ``open_device`` raises there is raised
        here.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ToolMissingError(
            "ray must be installed for devices in actors; pip install 'moeaccel[ray]'") from error
    where: Sequence[Mapping[str, Any]] = placement or [{} for _ in specs]
    if not specs or len(where) != len(specs):
        raise InvalidOption(f"placement must have options for each of the {len(specs)} specs, one "
                            f"or more, not {len(where)}")
    if not ray.is_initialized():
        ray.init(num_cpus=max(os.cpu_count() or 1, len(specs)), log_to_driver=False,
                 include_dashboard=False)
    shards = [RayShard(ray, number, spec, options, place)
              for number, (spec, place) in enumerate(zip(specs, where, strict=True))]
    end = time.monotonic() + start_timeout
    try:
        for shard in shards:
            shard.wait(end)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return Cluster(shards, on_loss=on_loss)
