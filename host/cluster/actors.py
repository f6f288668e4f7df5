"""Shards in actors of Ray: each opens a device where it runs, on any machine of a Ray cluster."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moeaccel.errors import MoeAccelError, ToolMissingError
from moeaccel.host.cluster.cluster import Cluster
from moeaccel.host.cluster.shard import LOST, Floats, Pairs, Shard, Worker
from moeaccel.host.errors import InvalidOption
from moeaccel.host.opening import open_device

__all__ = ["RayShard", "ray_cluster"]


class _Raised(NamedTuple):
    """An error of ours, as it travels: some take more than a message to be made."""

    kind: type[MoeAccelError]
    arguments: tuple[Any, ...]
    state: dict[str, Any]

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

    def ask(self, what: str, *arguments: Any) -> Any:
        """Do it, and return what came of it, or the error."""
        try:
            if self._worker is None:
                self._worker = Worker(open_device(self._spec, **self._options))
            found = getattr(self._worker, what)(*arguments)
            return found() if callable(found) else found
        except MoeAccelError as error:
            return _Raised(type(error), error.args, error.__dict__)

    def where(self) -> tuple[int, str]:
        """Return its process and machine."""
        return os.getpid(), os.uname().nodename


class RayShard(Shard):
    """A device of an actor.

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
        self._ray = ray
        self.gone = (*LOST, ray.exceptions.RayActorError, ray.exceptions.NodeDiedError)
        kind = ray.remote(**({"num_cpus": 1} | dict(placement)))(_Actor)
        self._actor = kind.remote(spec, dict(options))
        process, machine = ray.get(self._actor.where.remote())
        self.process = process
        self.name = f"{number}, {spec!r} in process {process} on {machine}"

    def _ask(self, *arguments: Any) -> Callable[[], Any]:
        reference = self._actor.ask.remote(*arguments)

        def wait() -> Any:
            found = self._ray.get(reference)
            if isinstance(found, _Raised):
                raise found.again()
            return found

        return wait

    def load(self, key: int, gate_up: Sequence[Floats], down: Sequence[Floats],
             options: dict[str, Any]) -> Callable[[], None]:
        return self._ask("load", key, gate_up, down, options)

    def submit(self, key: int, pairs: Pairs) -> Callable[[], Floats]:
        return self._ask("submit", key, pairs)

    def drop(self, key: int) -> None:
        """Let it free experts; nobody waits for that."""
        self._ask("drop", key)

    def close(self) -> None:
        """End the actor, and its device with it."""
        self._ray.kill(self._actor)


def ray_cluster(specs: Sequence[str], *, on_loss: str = "error",
                placement: Sequence[Mapping[str, Any]] | None = None,
                **options: Any) -> Cluster:
    """Open a device in an actor of Ray for each specification, and return them as a cluster.

    Ray is initialised before (``ray.init(address=...)`` for several machines), or here, on this
    machine alone.

    Parameters
    ----------
    specs : sequence of :class:`str`
        ``"golden"``, ``"rtl"``, ``"xdma:0"``, ...: what the actor opens on its machine.
    on_loss
        See :class:`Cluster`.
    placement : sequence of mappings, optional
        Ray's options of each actor, which decide on which machine it runs.
    **options
        ``config``, ``memory_bytes`` and others of :func:`moeaccel.host.open_device`.

    Raises
    ------
    ToolMissingError
        If Ray is not installed.
    InvalidOption
        If there are no specifications, or placements of other devices.
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
        ray.init(log_to_driver=False, include_dashboard=False)
    return Cluster([RayShard(ray, number, spec, options, place)
                    for number, (spec, place) in enumerate(zip(specs, where, strict=True))],
                   on_loss=on_loss)
