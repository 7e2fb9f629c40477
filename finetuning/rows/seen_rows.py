"""Which row hashes a scan has seen, and on which line first: a hash table of bounded size.

Knows 64-bit prefixes only; two rows that share one (chance 1e-9 in a full file) cost a needless warning.
"""

from array import array


class SeenRows:
    """First line of each row hash: open addressing over two arrays, 12 bytes a slot, at most four fifths full."""

    def __init__(self) -> None:
        self._count = 0
        self._resize(4096)

    def first_line(self, digest: bytes, line: int) -> int | None:
        """The line that had this hash before; None when it is new (and now remembered)."""
        key = int.from_bytes(digest[:8], "little") or 1
        slot = self._slot(key)
        if self._keys[slot]:
            return self._lines[slot]
        self._keys[slot], self._lines[slot] = key, line
        self._count += 1
        if self._count * 5 > len(self._keys) * 4:
            old = zip(self._keys, self._lines, strict=True)
            self._resize(len(self._keys) * 2)
            for kept, first in old:
                if kept:
                    slot = self._slot(kept)
                    self._keys[slot], self._lines[slot] = kept, first
        return None

    def _resize(self, slots: int) -> None:
        self._keys, self._lines = array("Q", bytes(8 * slots)), array("I", bytes(4 * slots))

    def _slot(self, key: int) -> int:
        mask = len(self._keys) - 1
        slot = hash(key.to_bytes(8, "little")) & mask  # keyed by the process, so no file can aim at one slot
        while self._keys[slot] not in (0, key):
            slot = (slot + 1) & mask
        return slot
