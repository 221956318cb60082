"""Whole matrices out of the fragments that ranks hold, and back.

Sharded optimizers (ZeRO, Megatron's distributed optimizer) and tensor parallelism leave each rank with pieces of
matrices, in any shape. An operation on whole matrices needs them together: each matrix has an owner among the ranks,
which receives all pieces, computes, and sends every rank its pieces of the result. Ranks that hold copies of a matrix
share the work in the same way. Only matrices of one bucket are whole at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.matrices import matrices
from pretrain.parallel.canonical import CanonicalParameter
from pretrain.parallel.shard import Shard

BUCKET_NUMEL = 2**26
"""Elements of the matrices that are whole at a time, over all ranks."""


@dataclass(frozen=True)
class Share:
    """Flat elements ``[start, start + numel)`` of a stored parameter, which the optimizer steps in ``key`` from element
    ``offset`` on."""

    parameter: CanonicalParameter
    start: int
    numel: int
    key: Tensor
    offset: int


@dataclass(frozen=True)
class _Piece:
    """Elements ``[start, stop)`` of a matrix's shard, in the shard's own order."""

    shard: Shard
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass
class _Plan:
    """One matrix: pieces by rank, and the rank that computes."""

    name: str
    shape: tuple[int, int]
    pieces: dict[int, list[_Piece]] = field(default_factory=lambda: defaultdict(list))
    owner: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def cost(self) -> int:
        """Relative cost of multiplying the matrix by its transpose."""
        return self.numel * min(self.shape)

    def sources(self) -> list[tuple[int, _Piece]]:
        """(rank, piece) from which the owner puts the matrix together: its own first, no piece twice."""
        chosen: dict[_Piece, int] = {}
        for rank in sorted(self.pieces, key=lambda rank: (rank != self.owner, rank)):
            for piece in self.pieces[rank]:
                chosen.setdefault(piece, rank)
        return [(rank, piece) for piece, rank in chosen.items()]


class MatrixExchange:
    """Collects the matrices of ``shares`` over ``group``, applies a function to each, hands the results back.

    Args:
        shares: what this rank holds.
        group: ranks that hold pieces or copies of the same matrices; None for this process alone. All of them
            construct and run the exchange together.
        device: where matrices are put together.

    Raises:
        RuntimeError: the ranks' pieces do not make up every matrix.
    """

    def __init__(
        self,
        shares: Iterable[Share],
        group: Any,
        device: torch.device,
        bucket_numel: int = BUCKET_NUMEL,
    ) -> None:
        self._group = group
        self._device = device
        self._rank = 0 if group is None else torch.distributed.get_rank(group)
        self._size = 1 if group is None else torch.distributed.get_world_size(group)
        self._places: dict[tuple[str, _Piece], tuple[Tensor, int]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for share in shares:
            for matrix in matrices(share.parameter):
                low = max(share.start, matrix.start)
                high = min(share.start + share.numel, matrix.start + matrix.shard.numel)
                if low < high:
                    piece = _Piece(matrix.shard, low - matrix.start, high - matrix.start)
                    self._places[matrix.name, piece] = (share.key, share.offset + low - share.start)
                    shapes[matrix.name] = matrix.shape
        held = [(name, shapes[name], piece) for name, piece in self._places]
        gathered: list[Any] = [held]
        if group is not None:
            gathered = [None] * self._size
            torch.distributed.all_gather_object(gathered, held, group=group)
        self._buckets = _buckets(_plans(gathered), bucket_numel)

    @property
    def is_empty(self) -> bool:
        """Whether no rank holds a matrix."""
        return not self._buckets

    def run(
        self,
        read: Callable[[Tensor, int, int], Tensor],
        compute: Callable[[Tensor], Tensor],
        write: Callable[[Tensor, int, Tensor, tuple[int, int]], None],
        dtype: torch.dtype,
    ) -> None:
        """Compute on all matrices. Collective over the group.

        Args:
            read: (key, offset, numel) to the values that enter.
            compute: whole matrix [rows, columns] of ``dtype`` to a matrix of the same shape and type.
            write: takes (key, offset, values of the result, shape of the whole matrix).
            dtype: in which values travel and are computed on.
        """
        for bucket in self._buckets:
            wholes = self._collect(bucket, read, dtype)
            results = {name: compute(whole).contiguous() for name, whole in wholes.items()}
            self._hand_back(bucket, results, write, dtype)

    def _collect(
        self, bucket: Sequence[_Plan], read: Callable[[Tensor, int, int], Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        outgoing: list[list[Tensor]] = [[] for _ in range(self._size)]
        incoming: list[list[tuple[_Plan, _Piece]]] = [[] for _ in range(self._size)]
        wholes: dict[str, Tensor] = {}
        for plan in bucket:
            if plan.owner == self._rank:
                wholes[plan.name] = torch.empty(plan.shape, dtype=dtype, device=self._device)
            for rank, piece in plan.sources():
                if rank == self._rank:
                    values = read(*self._places[plan.name, piece], piece.numel).to(self._device, dtype)
                    if plan.owner == rank:
                        _fill(wholes[plan.name], piece, values)
                    else:
                        outgoing[plan.owner].append(values)
                elif plan.owner == self._rank:
                    incoming[rank].append((plan, piece))
        is_local = all(rank == plan.owner for plan in bucket for rank, _ in plan.sources())
        received = self._swap(
            outgoing, [sum(piece.numel for _, piece in pieces) for pieces in incoming], dtype, is_local
        )
        offset = 0
        for plan, piece in (item for items in incoming for item in items):
            _fill(wholes[plan.name], piece, received[offset : offset + piece.numel])
            offset += piece.numel
        return wholes

    def _hand_back(
        self,
        bucket: Sequence[_Plan],
        results: dict[str, Tensor],
        write: Callable[[Tensor, int, Tensor, tuple[int, int]], None],
        dtype: torch.dtype,
    ) -> None:
        outgoing: list[list[Tensor]] = [[] for _ in range(self._size)]
        incoming: list[list[tuple[_Plan, _Piece]]] = [[] for _ in range(self._size)]
        for plan in bucket:
            for rank, pieces in plan.pieces.items():
                for piece in pieces:
                    if plan.owner == self._rank:
                        values = _flat(results[plan.name], piece)
                        if rank == self._rank:
                            write(*self._places[plan.name, piece], values, plan.shape)
                        else:
                            outgoing[rank].append(values)
                    elif rank == self._rank:
                        incoming[plan.owner].append((plan, piece))
        is_local = all(rank == plan.owner for plan in bucket for rank in plan.pieces)
        received = self._swap(
            outgoing, [sum(piece.numel for _, piece in pieces) for pieces in incoming], dtype, is_local
        )
        offset = 0
        for plan, piece in (item for items in incoming for item in items):
            write(*self._places[plan.name, piece], received[offset : offset + piece.numel], plan.shape)
            offset += piece.numel

    def _swap(self, outgoing: list[list[Tensor]], incoming: list[int], dtype: torch.dtype, is_local: bool) -> Tensor:
        """Send each rank its tensors, receive ``incoming`` elements of each rank, one after the other."""
        received = torch.empty(sum(incoming), dtype=dtype, device=self._device)
        if is_local:  # on every rank
            return received
        sizes = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
        flat = [tensor for tensors in outgoing for tensor in tensors]
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self._device)
        torch.distributed.all_to_all_single(received, sent, incoming, sizes, group=self._group)
        return received


def _plans(gathered: list[list[tuple[str, tuple[int, int], _Piece]]]) -> list[_Plan]:
    """One plan for each matrix, the costly ones first, with work spread evenly over ranks that hold much of it."""
    plans: dict[str, _Plan] = {}
    for rank, held in enumerate(gathered):
        for name, shape, piece in held:
            plans.setdefault(name, _Plan(name, shape)).pieces[rank].append(piece)
    ordered = sorted(plans.values(), key=lambda plan: (-plan.cost, plan.name))
    load = [0] * len(gathered)
    for plan in ordered:
        distinct = {piece for pieces in plan.pieces.values() for piece in pieces}
        found = sum(piece.numel for piece in distinct)
        if found != plan.numel:
            raise RuntimeError(f"{plan.name}: ranks hold {found} elements of a matrix of {plan.numel}")
        share = {rank: sum(piece.numel for piece in pieces) for rank, pieces in plan.pieces.items()}
        able = [rank for rank, numel in share.items() if 2 * numel >= max(share.values())]
        plan.owner = min(able, key=lambda rank: (load[rank], rank))
        load[plan.owner] += plan.cost
    return ordered


def _buckets(plans: list[_Plan], limit: int) -> list[list[_Plan]]:
    buckets: list[list[_Plan]] = []
    filled = limit
    for plan in plans:
        if filled + plan.numel > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(plan)
        filled += plan.numel
    return buckets


def _columns(whole: Tensor, shard: Shard) -> Tensor:
    """The shard's place in a whole matrix, [rows, width]."""
    return whole.view(shard.num_rows, shard.row_length)[:, shard.start : shard.stop]


def _flat(whole: Tensor, piece: _Piece) -> Tensor:
    """The values of a piece, 1-D."""
    return _columns(whole, piece.shard).reshape(-1)[piece.start : piece.stop]


def _fill(whole: Tensor, piece: _Piece, values: Tensor) -> None:
    """Put the values of a piece in their place: the rest of a row, whole rows, part of a row."""
    columns, width = _columns(whole, piece.shard), piece.shard.width
    start, done = piece.start, 0
    while start < piece.stop:
        row, column = divmod(start, width)
        rows = (piece.stop - start) // width if column == 0 else 0
        count = rows * width or min(width - column, piece.stop - start)
        block = columns[row : row + max(rows, 1), column : column + (width if rows else count)]
        block.copy_(values[done : done + count].view(block.shape))
        start, done = start + count, done + count
