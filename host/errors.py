"""Errors of the driver: each names the thing, its value, what was expected and what to do."""

from __future__ import annotations

from moeaccel.errors import MoeAccelError
from moeaccel.interface.commands import (
    ENTRY_BYTES,
    EXPERT,
    LAYER,
    ROUTER,
    SUBMISSION,
    Field,
    NonFinite,
    Overflow,
    Status,
)

__all__ = [
    "HostError", "NotCopyable", "UnsupportedTransport", "DeviceNotFound", "ConfigMismatch",
    "DeviceClosed",
    "InvalidTensor", "InvalidOption", "LimitExceeded", "OutOfDeviceMemory", "UploadError",
    "DeviceTimeout", "DeviceStopped", "HandleConsumed", "PortUnavailable", "LinkLost",
    "AccessFailed", "RecordingError", "ReplayMismatch",
    "CommandFailed", "CommandRejected", "ExpertRejected", "WindowViolation", "BusError",
    "NonFiniteInput", "GridOverflow", "LogitOverflow", "CommandAborted",
    "CompletionLost", "WatchdogExpired", "LOST", "command_error",
    "UnsupportedExperts", "ExpertsIgnored", "TrainingUnsupported", "GraphCaptureUnsupported",
           "WeightsGivenUp", "ShardLost", "ShardUnplaced"]


_WORDS = ENTRY_BYTES // 4
"""Of a structure in device memory."""


class HostError(MoeAccelError):
    """Base of the errors of :mod:`moeaccel.host`."""


# -- opening ---------------------------------------------------------------------------------------
class UnsupportedTransport(HostError, ValueError):
    """A device specification that this version cannot open."""


class DeviceNotFound(HostError):
    """What answers at the other end is no moeaccel device, or one of another version."""


class PortUnavailable(HostError, OSError):
    """A port that does not exist, is in use, or may not be opened by this user."""


class ConfigMismatch(HostError):
    """The device was built from another configuration than the driver was opened with."""


class DeviceClosed(HostError):
    """The device, or something that lived in its memory, is closed, or is another process's."""


class NotCopyable(HostError, TypeError):
    """Something that belongs to an open device was to be copied or pickled."""


# -- before anything is sent -----------------------------------------------------------------------
class InvalidTensor(HostError, ValueError):
    """A tensor of the wrong shape or type."""


class InvalidOption(HostError, ValueError):
    """An argument that is not among the possible values."""


class LimitExceeded(HostError, ValueError):
    """A layer or a call that is larger than this device's configuration allows."""


class OutOfDeviceMemory(HostError, MemoryError):
    """The device's memory has no room for an allocation."""


class UploadError(HostError):
    """What was read back from the device's memory is not what was written."""


# -- while it runs ---------------------------------------------------------------------------------
class DeviceTimeout(HostError, TimeoutError):
    """The device did not answer in time; :meth:`Device.reset` makes it usable again."""


class DeviceStopped(HostError):
    """The device cannot fetch commands, or not say that one has completed; ``errors`` says why.

    :meth:`Device.reset` makes it usable again.

    Parameters
    ----------
    message : :class:`str`
    errors : tuple of :class:`str`
        Fields of the ERROR_STATUS register that are set.
    """

    def __init__(self, message: str, errors: tuple[str, ...]) -> None:
        super().__init__(message)
        self.errors = errors


class LinkLost(HostError, ConnectionError):
    """The line to the device broke; :meth:`Device.reset` connects again, weights stay."""


class ShardLost(HostError, ConnectionError):
    """A device of a cluster, or the process that owned it, is gone; ``shard`` says which.

    Parameters
    ----------
    message : :class:`str`
    shard : :class:`int`
        Its number in the cluster.
    """

    def __init__(self, message: str, shard: int) -> None:
        super().__init__(message)
        self.shard = shard


class ShardUnplaced(HostError, TimeoutError):
    """No machine of a cluster has what an actor with a device asks for."""


class AccessFailed(HostError):
    """The device's bus refused an access to a register or to memory, or did not answer it."""


class HandleConsumed(HostError, ValueError):
    """The result of a handle was already taken, or the handle belongs to something else."""


class CommandFailed(HostError):
    """A command completed with a bad status; the device stays usable.

    Parameters
    ----------
    message : :class:`str`
    status : :class:`Status`
    detail, address : :class:`int`
        Of the completion; for ``NONFINITE`` the detail counts from the first token of the call,
        and the address is a :class:`NonFinite`; for ``OVERFLOW`` it is an :class:`Overflow`.
    """

    def __init__(self, message: str, *, status: Status | int, detail: int, address: int) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail
        self.address = address


class CommandRejected(CommandFailed):
    """The device found a field of what it was sent out of range."""


class ExpertRejected(CommandRejected):
    """The device found an entry of the expert table that it cannot go by; y is undefined."""

    @property
    def expert(self) -> int:
        """Whose entry it is, the first where there are several."""
        return self.detail

    @property
    def fields(self) -> tuple[str, ...]:
        """The field, or those that share its 32-bit word."""
        return tuple(field.name for field in EXPERT if field.word == self.address % _WORDS)


class WindowViolation(CommandFailed):
    """A command wanted to touch memory outside the window; ``address`` says where."""


class BusError(CommandFailed):
    """Memory answered with an error; ``address`` says where."""


class NonFiniteInput(CommandFailed):
    """x, a routing weight or a logit is NaN or infinite; ``what`` says which, ``token`` where."""

    @property
    def token(self) -> int:
        """Row of x, or of the routing weights."""
        return self.detail

    @property
    def what(self) -> str:
        """``"x"``, ``"routing weight"`` or ``"logit"``."""
        return _nonfinite(self.address)


class GridOverflow(CommandFailed):
    """Weighted outputs are too large for the layer's output grid; ``overflows`` says how many."""

    @property
    def overflows(self) -> int:
        """Number of outputs that did not fit."""
        return self.detail


class LogitOverflow(GridOverflow):
    """Logits are too large for the router; ``overflows`` says how many."""


class CommandAborted(CommandFailed):
    """The command was ended by :meth:`Device.abort` or :meth:`Device.reset`."""


class CompletionLost(CommandFailed):
    """The device said that the command has completed, but how is not in memory."""


class WatchdogExpired(CommandFailed):
    """The device made no progress for as many cycles as its watchdog allows."""


LOST = -1
"""Status that the driver gives a command whose completion was not written; none of the device's."""


def _nonfinite(address: int) -> str:
    if address not in list(NonFinite):
        return f"value of kind {address}"
    return NonFinite(address).name.lower().replace("_", " ")


def _field_at(fields: tuple[Field, ...], word: int) -> str:
    """Return the names of the fields of a 32-bit word, and what each must be."""
    said = []
    for field in fields:
        if field.word == word:
            limits = "; ".join(filter(None, (limit.text() for limit in field.limits)))
            if field.name.endswith("_address"):
                limits += ", where all that is there ends, too"
            said.append(f"{field.name} must be {limits or 'what the other fields give'}")
    return ", ".join(said) or f"word {word} must be in the device's range"


def command_error(status: int, detail: int, address: int, *, first_token: int = 0) -> CommandFailed:
    """Return the error for a completion's status.

    Parameters
    ----------
    status, detail, address : :class:`int`
        Of the completion.
    first_token : :class:`int`
        Row of the caller's x that was the command's first token.
    """
    kind: type[CommandFailed]
    match status:
        case Status.BAD_OPCODE:
            kind, text = CommandRejected, (
                f"opcode must be one that the device knows, not {detail}; "
                "is the driver newer than the device?")
        case Status.BAD_FIELD:
            kind, text = CommandRejected, (
                f"submission field {_field_at(SUBMISSION, detail)}; nothing was started")
        case Status.BAD_LAYER:
            kind, text = CommandRejected, (
                f"layer descriptor field {_field_at(LAYER, detail)}, in that at {address:#x}; "
                "nothing was started")
        case Status.BAD_ROUTER:
            kind, text = CommandRejected, (
                f"router descriptor field {_field_at(ROUTER, detail)}, in that at {address:#x}; "
                "nothing was started")
        case Status.BAD_EXPERT:
            of_router, word = divmod(address, _WORDS)
            kind, text = ExpertRejected, (
                f"{'router' if of_router else 'expert'} table entry of expert {detail}: field "
                f"{_field_at(EXPERT, word)}; y is "
                "undefined, load the layer again if something else wrote to the device's memory")
        case Status.WINDOW:
            kind, text = WindowViolation, (
                f"burst at {address:#x} must be inside the memory window; it was suppressed")
        case Status.BUS_ERROR:
            kind, text = BusError, (
                f"memory must answer the burst at {address:#x}, but reported an error; "
                "check the device's memory size")
        case Status.NONFINITE:
            detail += first_token
            kind, text = NonFiniteInput, (
                f"{_nonfinite(address)} must be finite, but token {detail} holds NaN or infinity; "
                "find the layer that made it")
        case Status.OVERFLOW if address == Overflow.LOGIT:
            kind, text = LogitOverflow, (
                f"logits must be below 2048 in magnitude, but {detail} were not (with outputs "
                "beyond their grid), and counted as that; scale the router's weights, or clamp its "
                "logits")
        case Status.OVERFLOW:
            kind, text = GridOverflow, (
                f"weighted outputs must fit the output grid, but {detail} did not; load the "
                "weights again with a larger grid_exponent than the layer has (8 more for values "
                "256 times as large), or with the x_rms of this x")
        case Status.ABORTED:
            kind = CommandAborted
            text = ("command was ended by abort(), reset() or close(); submit it again, to a "
                    "device that is open")
        case _ if status == LOST:
            kind, text = CompletionLost, (
                "completion must be in memory when the device says so, but was not written; its "
                "result is lost, submit the command again, and check the device's memory")
        case Status.WATCHDOG:
            kind, text = WatchdogExpired, (
                "command made no progress for as many cycles as the watchdog allows; call "
                "device.reset() and try again, or open the device with a larger watchdog_cycles")
        case _:
            kind, text = CommandFailed, (
                f"completion status must be one of {[int(s) for s in Status]}, not {status}; "
                "is the driver older than the device?")
    known = status in [int(s) for s in Status]
    return kind(text, status=Status(status) if known else status, detail=detail, address=address)


# -- recordings ------------------------------------------------------------------------------------
class RecordingError(HostError):
    """A file that is no recording, or cannot be written."""


class ReplayMismatch(HostError):
    """The driver asks something else than what was recorded."""


# -- transformers ----------------------------------------------------------------------------------
class UnsupportedExperts(HostError, NotImplementedError):
    """An experts module does something that the device does not do."""


class ExpertsIgnored(HostError):
    """A model, or a part of it, does not use the experts implementation that was asked for."""


class TrainingUnsupported(HostError, NotImplementedError):
    """The device computes no gradients."""


class WeightsGivenUp(HostError, RuntimeError):
    """Weights have to be uploaded again of which the host kept no copy."""


class GraphCaptureUnsupported(HostError, NotImplementedError):
    """A replayed CUDA graph would not ask the device."""
