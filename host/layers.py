"""Layers in device memory: call them with tensors, or submit now and take the result later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moeaccel.config import TOP_K_MAX
from moeaccel.host.errors import InvalidOption, InvalidTensor, LimitExceeded
from moeaccel.host.layer import CallStatistics, Handle, Layer
from moeaccel.host.memory import Allocation
from moeaccel.host.report import WeightReport
from moeaccel.host.tensors import Tensor, float32, indices, shape_of
from moeaccel.image import ExpertShape, LinearShape
from moeaccel.interface.commands import Opcode

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = ["CallStatistics", "Experts", "Handle", "Linear", "Linears"]


class Experts(Layer):
    """The experts of one layer in device memory; from :meth:`Device.load_experts`.

    ``y[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t])``, plus that of all shared
    experts, which have the last entries of the table: every token has a pair with each, of weight
    1. That is 8 bytes more a token and expert, and the device knows no difference. Identity experts
    follow those that ids name, and are one entry behind all, a matrix.
    """

    def __init__(self, device: Device, shapes: Sequence[ExpertShape], images: Allocation,
                 descriptor: Allocation, planes: int, grid_exponent: int,
                 report: WeightReport, shared: int = 0, row_blocks: int = 1, identity: int = 0
                 ) -> None:
        d_model = shapes[0].d_model
        super().__init__(device, images, descriptor, d_in=d_model, d_out=d_model, planes=planes,
                         grid_exponent=grid_exponent, report=report, opcode=Opcode.EXPERTS,
                         num_experts=len(shapes) + (identity > 0))
        routed = len(shapes) - shared
        self._shapes, self._shared_shapes = tuple(shapes[:routed]), tuple(shapes[routed:])
        self._row_blocks, self._identity = row_blocks, identity

    @property
    def shapes(self) -> tuple[ExpertShape, ...]:
        """Formats, dimensions and activation of each expert, or of each of its blocks; the
        dimensions are the caller's."""
        return self._shapes

    @property
    def row_blocks(self) -> int:
        """Blocks of each expert's hidden rows, of which a call may take the leading ones."""
        return self._row_blocks

    @property
    def shared_shapes(self) -> tuple[ExpertShape, ...]:
        """Those of each shared expert."""
        return self._shared_shapes

    @property
    def shape(self) -> ExpertShape:
        """The shape of every expert.

        Raises
        ------
        InvalidOption
            If they differ, see :attr:`shapes`.
        """
        found = set(self._shapes)
        if len(found) > 1:
            raise InvalidOption(f"shape must be that of all experts, but there are {len(found)}; "
                                "ask for shapes")
        return self._shapes[0]

    @property
    def num_experts(self) -> int:
        """Number of experts, without shared and identity ones."""
        return len(self._shapes) // self._row_blocks

    @property
    def num_identity(self) -> int:
        """Number of identity experts: ids from :attr:`num_experts` on."""
        return self._identity

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, *,
                 leading_blocks: int | None = None) -> Any:
        """Return y, (T, H); see :meth:`submit` and :meth:`sync`."""
        return self._call(self.submit(x, ids, weights, leading_blocks=leading_blocks))

    def submit(self, x: Tensor, ids: Tensor, weights: Tensor, *,
               leading_blocks: int | None = None) -> Handle:
        """Send a call to the device and return a handle for :meth:`sync`.

        The call is cut into as many commands as the device's limits on tokens and assignments, and
        its free memory, ask for. When ring or memory is full this waits for room.

        Parameters
        ----------
        x : float tensor, (T, H)
            Any T, also 0. A torch tensor in bfloat16 goes to the device as it is, and y comes back
            so, rounded once; all else goes and comes as float32.
        ids : integer tensor, (T, K)
            Experts of each token, at most 16 with the shared ones; those below 0, or from E on and
            beyond the identity experts, are skipped.
        weights : float tensor, (T, K)
        leading_blocks : :class:`int`, optional
            So many of each expert's ``row_blocks``, the first ones, all when left out: as if the
            rest of h were 0. K times that is at most 16.

        Raises
        ------
        InvalidTensor, InvalidOption, LimitExceeded
            Before anything is sent.
        OutOfDeviceMemory
            If not even the buffers of one token fit.
        """
        blocks = self._row_blocks if leading_blocks is None else leading_blocks
        if not isinstance(blocks, int) or not 1 <= blocks <= self._row_blocks:
            raise InvalidOption(f"leading_blocks must be from 1 to the layer's {self._row_blocks} "
                                f"row_blocks, not {leading_blocks!r}")
        tokens = self._check_x(x)
        shape = shape_of("ids", ids, "T", "K")
        if shape[0] != tokens:
            raise InvalidTensor(f"ids must have the shape (T, K) with T = {tokens}, not {shape}")
        shared = len(self._shared_shapes)
        if shape[1] * blocks + shared > TOP_K_MAX:
            why = [f"{shared} of {TOP_K_MAX} are shared"] * bool(shared) + [
                f"each has {blocks} blocks"] * (blocks > 1)
            raise LimitExceeded(
                f"ids must have at most {(TOP_K_MAX - shared) // blocks} experts for each token, "
                f"not {shape[1]}" + (f": {', '.join(why)}" if why else ""))
        found = shape_of("weights", weights, "T", "K")
        if found != shape:
            raise InvalidTensor(f"weights must have the shape of ids, {shape}, not {found}")
        routed = self.num_experts
        if self._row_blocks == 1 and not shared and not self._identity:
            return self._submit(x, ids, weights, tokens, shape[1])
        pairs, scores = indices("ids", ids, routed + self._identity), float32("weights", weights)
        identity = pairs >= routed
        if self._row_blocks > 1:  # a block is an expert of the device
            pieces = pairs[:, :, None] * self._row_blocks + np.arange(blocks, dtype=np.int32)
            skipped = (pairs < 0) | identity
            pairs = np.where(skipped[:, :, None], -1, pieces).reshape(tokens, -1)
            scores = np.repeat(scores, blocks, axis=1)
            identity = (identity[:, :, None] & (np.arange(blocks) == 0)).reshape(tokens, -1)
        pairs = np.where(identity, len(self._shapes) + shared, pairs).astype(np.int32)
        if shared:
            always = np.arange(shared, dtype=np.int32) + len(self._shapes)
            pairs = np.hstack([pairs, np.tile(always, (tokens, 1))])
            scores = np.hstack([scores, np.ones((tokens, shared), np.float32)])
        return self._submit(x, pairs, scores, tokens, pairs.shape[1])


class Linear(Layer):
    """A linear layer in device memory, ``y = x W^T``; from :meth:`Device.load_linear`."""

    def __init__(self, device: Device, shape: LinearShape, images: Allocation,
                 descriptor: Allocation, planes: int, grid_exponent: int,
                 report: WeightReport) -> None:
        super().__init__(device, images, descriptor, d_in=shape.d_in, d_out=shape.d_out,
                         planes=planes, grid_exponent=grid_exponent, report=report,
                         opcode=Opcode.GEMM, num_experts=1)
        self._shape = shape

    @property
    def shape(self) -> LinearShape:
        """Format and dimensions, the caller's."""
        return self._shape

    def __call__(self, x: Tensor) -> Any:
        """Return y, (T, N); see :meth:`submit` and :meth:`sync`."""
        return self._call(self.submit(x))

    def submit(self, x: Tensor) -> Handle:
        """Send a call to the device and return a handle for :meth:`sync`.

        Parameters
        ----------
        x : float tensor, (T, K)
            Any T, also 0. bfloat16 as in :meth:`Experts.submit`.

        Raises
        ------
        InvalidTensor
            Before anything is sent.
        OutOfDeviceMemory
            If not even the buffers of one token fit.
        """
        tokens = self._check_x(x)
        return self._submit(x, None, None, tokens, 1)


class Linears(Layer):
    """Matrices of one shape in device memory, of which each row of x takes one:
    ``y[t] = weights[t] * W[ids[t]] x[t]``; from :func:`moeaccel.host.weights.load_linears`.

    Each is an entry of an expert table with one section, and a call is one EXPERTS command: rows of
    x with one matrix are computed together, and its weights are read once.
    """

    def __init__(self, device: Device, shapes: Sequence[LinearShape], images: Allocation,
                 descriptor: Allocation, planes: int, grid_exponent: int,
                 report: WeightReport) -> None:
        super().__init__(device, images, descriptor, d_in=shapes[0].d_in, d_out=shapes[0].d_out,
                         planes=planes, grid_exponent=grid_exponent, report=report,
                         opcode=Opcode.EXPERTS, num_experts=len(shapes))
        self._shapes = tuple(shapes)

    @property
    def shapes(self) -> tuple[LinearShape, ...]:
        """Formats and dimensions."""
        return self._shapes

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        """Return y, (T, N).

        Parameters
        ----------
        x : float tensor, (T, K)
        ids : integer tensor, (T,)
            Below 0 or beyond the last: y is 0.
        weights : float tensor, (T,)

        Raises
        ------
        InvalidTensor
            Before anything is sent.
        """
        tokens = self._check_x(x)
        for name, value in (("ids", ids), ("weights", weights)):
            if shape_of(name, value, "T") != (tokens,):
                raise InvalidTensor(f"{name} must have the shape (T,) with T = {tokens}, not "
                                    f"{tuple(value.shape)}")
        return self._call(self._submit(x, ids[:, None], weights[:, None], tokens, 1))
