"""Changes of the rows' block tables, gathered until the model takes them with its next step."""

from __future__ import annotations

import numpy as np

from vllm_ssd.draft.model import BlockChanges

_NO_CHANGES = BlockChanges.of_tables(np.zeros(0, np.int32), np.zeros((0, 0), np.int32))


class TableChanges:
    """Changes of the rows' block tables that the model does not have yet."""

    def __init__(self) -> None:
        self._trunks: dict[int, int] = {}
        """By fork, both rows."""
        self._shared = 0
        self._entries: dict[int, list[tuple[int, list[int]]]] = {}
        """By row: blocks from some entry on."""

    def clear(self) -> None:
        """Forget them all."""
        self._trunks.clear()
        self._entries.clear()
        self._shared = 0

    def drop(self, rows: list[int]) -> None:
        """Forget those of rows that are free."""
        for row in rows:
            self._trunks.pop(row, None)
            self._entries.pop(row, None)

    def fork(self, row: int, trunk: int, first: int, blocks: list[int]) -> None:
        """A row takes over the first entries of another one's table; its own blocks follow."""
        self._trunks[row] = trunk
        self._shared = max(self._shared, first)
        self._entries[row] = [(first, blocks)]

    def set(self, row: int, first: int, blocks: list[int]) -> None:
        """A row's table has these blocks from entry ``first`` on."""
        self._entries.setdefault(row, []).append((first, blocks))

    def take(self) -> BlockChanges:
        """All of them, without copies of blocks; nothing is left afterwards."""
        if not self._entries and not self._trunks:
            return _NO_CHANGES
        latest = {
            (row, column): block
            for row, changes in self._entries.items()
            for first, blocks in changes
            for column, block in enumerate(blocks, first)
        }
        entries = np.array([(*at, block) for at, block in latest.items()], np.int32).reshape(-1, 3)
        forks = np.array(list(self._trunks.items()), np.int32).reshape(-1, 2)
        shared = self._shared
        self.clear()
        none = np.zeros(0, np.int32)
        rows, columns, blocks = np.ascontiguousarray(entries.T)
        fork_rows, trunks = np.ascontiguousarray(forks.T)
        return BlockChanges(none, none, fork_rows, trunks, shared, rows, columns, blocks)
