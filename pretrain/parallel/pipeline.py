"""Cutting a stack of layers into pipeline chunks. Torch-free: planning and checks read this."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.parallel.stage import Stage


def balanced_split(costs: Sequence[float], num_chunks: int, first_extra: float = 0, last_extra: float = 0) -> list[int]:
    """Numbers of layers of ``num_chunks`` consecutive chunks such that the dearest chunk is as cheap as possible.

    ``costs`` holds one number for each layer; ``first_extra`` and ``last_extra`` are what the first chunk (embedding)
    and the last one (head) cost besides. Every chunk gets at least one layer. Exact, in O(layers^2 x chunks). Among
    splits with the same dearest chunk the one with the smallest sum of squared chunk costs is taken, and among those
    the one with the fewest layers in the first chunk, then in the second, and so on: early stages hold the
    activations of more micro-batches. Raises ``ValueError`` when there are more chunks than layers.
    """
    num_layers = len(costs)
    if not 1 <= num_chunks <= num_layers:
        raise ValueError(f"{num_layers} layers cannot make {num_chunks} chunks; take 1 to {num_layers} chunks")
    cost = _chunk_costs(costs, first_extra, last_extra)

    # dearest[i]: the dearest chunk of the best split of layers i.. into the chunks handled so far.
    dearest = [row[num_layers] for row in cost[:num_layers]]
    for chunks in range(2, num_chunks + 1):
        dearest = [
            min(max(cost[i][j], dearest[j]) for j in range(i + 1, num_layers - chunks + 2))
            for i in range(num_layers - chunks + 1)
        ]
    limit = dearest[0]

    # The same again for the sum of squares, over chunks within the limit; None where there is no such split.
    squares: list[float | None] = [
        row[num_layers] ** 2 if row[num_layers] <= limit else None for row in cost[:num_layers]
    ]
    ends: list[list[int]] = []  # for each number of chunks from 2 on: where the first chunk from layer i ends
    for chunks in range(2, num_chunks + 1):
        before, squares, chosen = squares, [], []
        for i in range(num_layers - chunks + 1):
            options = [
                (cost[i][j] ** 2 + rest, j)
                for j in range(i + 1, num_layers - chunks + 2)
                if cost[i][j] <= limit and (rest := before[j]) is not None
            ]
            best = min(options, default=None)
            squares.append(None if best is None else best[0])
            chosen.append(num_layers if best is None else best[1])
        ends.append(chosen)

    split, start = [], 0
    for chosen in reversed(ends):
        split.append(chosen[start] - start)
        start = chosen[start]
    return [*split, num_layers - start]


def explicit_split(split: Sequence[int], num_layers: int, num_chunks: int) -> list[int]:
    """``split`` as it is, when it cuts ``num_layers`` into ``num_chunks`` chunks. Raises ``ValueError`` else."""
    if len(split) != num_chunks or any(size < 1 for size in split) or sum(split) != num_layers:
        raise ValueError(
            f"pipeline_split {list(split)}: expected {num_chunks} positive numbers of layers"
            f" that add up to {num_layers}"
        )
    return list(split)


def stages(split: Sequence[int]) -> list[Stage]:
    """The chunks of ``split`` in model order: the embedding is in the first, the head in the last."""
    bounds = [sum(split[:i]) for i in range(len(split) + 1)]
    last = len(split) - 1
    return [Stage(bounds[i], bounds[i + 1], i == 0, i == last) for i in range(len(split))]


def pipeline_stages(
    num_layers: int,
    costs: Sequence[float],
    end_costs: tuple[float, float],
    pipeline_parallel: int,
    virtual_pipeline: int = 1,
    split: Sequence[int] | None = None,
) -> list[list[Stage]]:
    """The chunks of every pipeline rank, as ``[pipeline rank][chunk of the rank]``.

    ``costs`` are those of the layers, ``end_costs`` those of embedding and head; they are used when there is no
    explicit ``split``. Chunk v of rank p is number v x ``pipeline_parallel`` + p of the model, as in Megatron's
    interleaved schedule (arXiv 2104.04473, section 2.2). Raises ``ValueError`` for an impossible cut.
    """
    num_chunks = pipeline_parallel * virtual_pipeline
    assert len(costs) == num_layers, f"{len(costs)} costs of {num_layers} layers"
    if split is None:
        sizes = balanced_split(costs, num_chunks, *end_costs)
    else:
        sizes = explicit_split(split, num_layers, num_chunks)
    cut = stages(sizes)
    return [cut[rank::pipeline_parallel] for rank in range(pipeline_parallel)]


def stage_cost(stage: Stage, costs: Sequence[float], end_costs: tuple[float, float]) -> float:
    """What one chunk costs: its layers, and embedding and head where it holds them."""
    first, last = end_costs
    return first * stage.has_embedding + sum(costs[stage.first : stage.stop]) + last * stage.has_head


def _chunk_costs(costs: Sequence[float], first_extra: float, last_extra: float) -> list[list[float]]:
    """``[i][j]``: cost of layers i to j-1 as one chunk. Summed chunk by chunk, so that equal chunks cost equally."""
    num_layers = len(costs)
    table = []
    for i in range(num_layers):
        row: list[float] = [0.0] * (i + 1)
        total: float = first_extra if i == 0 else 0
        for j in range(i, num_layers):
            total += costs[j]
            row.append(total + last_extra if j == num_layers - 1 else total)
        table.append(row)
    return table
