"""Which memory torch operations read and write, as they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NO_ACCESS = {"empty_like", "new_empty", "new_empty_strided", "zeros_like", "ones_like", "full_like", "new_zeros"}
_ONLY_WRITE = {"zero_", "fill_", "copy_"}


class Watch(TorchDispatchMode):
    """Calls ``told`` before each operation, with the tensors it touches (and whether it writes them) and its name.

    What operations of ``told`` do is not watched, unless within :meth:`again`.
    """

    def __init__(self, told: Callable[[Sequence[tuple[Tensor, bool]], str], None]) -> None:
        super().__init__()
        self._told = told
        self._paused = 0
        self._telling = False

    def again(self) -> AbstractContextManager[Any]:
        """Watch also what is done while an operation is told of, when torch suspends the watch."""
        return self if self._telling else nullcontext()

    @contextmanager
    def off(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not self._paused and name not in _NO_ACCESS and not func.is_view:
            reads, writes = [], []
            given = (kwargs or {}).get
            for number, argument in enumerate(func._schema.arguments):
                value = args[number] if number < len(args) else given(argument.name)
                is_write = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in _tensors(value):
                    if not is_write or name not in _ONLY_WRITE:
                        reads.append((tensor, False))
                    if is_write:
                        writes.append((tensor, True))
            telling, self._telling = self._telling, True
            try:
                self._told([*reads, *writes], name)
            finally:
                self._telling = telling
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, (list, tuple)) else []
