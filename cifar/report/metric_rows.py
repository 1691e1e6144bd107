"""The rows of a run as arrays of numbers: a tenth of the memory of dictionaries, and quick to read by columns.

A row is a dictionary to whoever asks for one: the same names in the same order and the same numbers, bit by bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from cifar.tracking.records import MAX_EPOCH

Row = dict[str, Any]
Numbers = NDArray[np.float64]
Ids = NDArray[np.int64]
MAX_LAYOUTS = 10_000  # of all runs
MAX_EXACT = 2.0**53  # whole numbers below it are the same as 64-bit floats


@dataclass(frozen=True, eq=False)
class Layout:
    """What a row holds: its names, in their order, and which of its numbers are whole ones."""

    names: tuple[str, ...]
    is_whole: tuple[bool, ...]

    @cached_property
    def places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def whole_places(self) -> list[int]:
        return [place for place, whole in enumerate(self.is_whole) if whole]


class MetricRows(Sequence[Row]):
    """A tuple of rows, stored as numbers.

    layouts: that the rows have, each once. ids: the place in `layouts` of each row's layout. values: the numbers of all rows,
    one row after the other.
    """

    def __init__(self, layouts: tuple[Layout, ...], ids: Ids, values: Numbers) -> None:
        self.layouts, self.ids, self.values = layouts, ids, values
        is_table = len(layouts) > 0 and all(layout.names == layouts[0].names for layout in layouts[1:])
        self._table = values.reshape(len(ids), len(layouts[0].names)) if is_table else None
        self._last: Row | None = None

    def __reduce__(self) -> tuple[type[MetricRows], tuple[Any, ...]]:
        return MetricRows, (self.layouts, self.ids, self.values)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, place: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(place, slice):
            return tuple(map(self._make_row, range(*place.indices(len(self)))))
        index = place + len(self) if place < 0 else place
        if not 0 <= index < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        if index < len(self) - 1:
            return self._make_row(index)
        if self._last is None:  # it is asked for many times
            self._last = self._make_row(index)
        return self._last

    def __iter__(self) -> Iterator[Row]:
        return map(self._make_row, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, MetricRows | tuple) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as a tuple of dictionaries

    def __repr__(self) -> str:
        return repr(tuple(self))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all rows."""
        return tuple(dict.fromkeys(name for layout in self.layouts for name in layout.names))

    def read_column(self, name: str) -> Numbers:
        """The numbers of that name: (rows,). NaN where a row has none."""
        if self._table is not None:
            place = self.layouts[0].places.get(name)
            return self._table[:, place] if place is not None else np.full(len(self), np.nan)
        places = np.array([layout.places.get(name, -1) for layout in self.layouts], np.int64)[self.ids]
        column = np.full(len(self), np.nan)
        is_known = places >= 0
        column[is_known] = self.values[self._starts[:-1][is_known] + places[is_known]]
        return column

    @cached_property
    def _starts(self) -> Ids:
        return find_starts(self.layouts, self.ids)

    def _make_row(self, index: int) -> Row:
        layout = self.layouts[self.ids[index]]
        if self._table is not None:
            numbers = self._table[index].tolist()
        else:
            numbers = self.values[self._starts[index] : self._starts[index + 1]].tolist()
        for place in layout.whole_places:
            numbers[place] = int(numbers[place])
        return dict(zip(layout.names, numbers))  # noqa: B905 (many rows; is_exact and the reshape have compared the lengths)


class RowPacker:
    """Makes `MetricRows` of rows. A layout that several runs have is kept once."""

    def __init__(self) -> None:
        self._layouts: dict[Any, Layout | None] = {}  # names and types -> the layout; None for other types than numbers

    def parse(self, content: bytes) -> MetricRows | None:
        """The rows of a metrics.jsonl (bytes) where all have the same names and kinds of numbers; quicker than `pack`.

        None for all others, among them everything that may not be in such a file.
        """
        if not content.isascii() or b"\\" in content:
            return None
        try:
            rows = list(map(from_json, content.split(b"\n")[:-1]))
            if set(map(type, rows)) != {dict} or len(set(map(tuple, rows))) > 1:
                return None
            if len({tuple(map(type, row.values())) for row in rows}) > 1:
                return None
            layout = self._find_layout(rows[0])
            if layout is None or not layout.names:
                return None
            flat = itertools.chain.from_iterable(map(dict.values, rows))
            values = np.fromiter(flat, np.float64, len(rows) * len(layout.names))
        except (ValueError, OverflowError):
            return None
        ids = np.zeros(len(rows), np.int64)
        if not is_exact((layout,), ids, values):
            return None
        if (place := layout.places.get("epoch")) is not None:
            epochs = values[place :: len(layout.names)]
            if not layout.is_whole[place] or epochs.min() < 0 or epochs.max() > MAX_EPOCH:
                return None
        return MetricRows((layout,), ids, values)

    def _find_layout(self, row: Row) -> Layout | None:
        key = (*row, *map(type, row.values()))
        if key not in self._layouts and len(self._layouts) < MAX_LAYOUTS:
            self._layouts[key] = _make_layout(row)
        return self._layouts.get(key)

    def share(self, rows: MetricRows) -> MetricRows:
        """The same rows from another process, with the layouts that those of this one have."""
        layouts = []
        for layout in rows.layouts:
            key = (*layout.names, *(int if whole else float for whole in layout.is_whole))
            known = self._layouts.setdefault(key, layout) if len(self._layouts) < MAX_LAYOUTS else self._layouts.get(key)
            layouts.append(known or layout)
        return MetricRows(tuple(layouts), rows.ids, rows.values)

    def pack(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The same rows as numbers; a tuple of them if they hold something else, or a whole number that no float holds."""
        places, numbers = dict[Layout, int](), list[float]()
        ids = []
        for row in rows:
            layout = self._find_layout(row)
            if layout is None:
                return tuple(rows)
            ids.append(places.setdefault(layout, len(places)))
            numbers += row.values()
        layouts, values = tuple(places), np.array(numbers, np.float64)
        packed = MetricRows(layouts, np.array(ids, np.int64), values)
        return packed if is_exact(layouts, packed.ids, values) else tuple(rows)


def _make_layout(row: Row) -> Layout | None:
    types = tuple(map(type, row.values()))
    return Layout(tuple(row), tuple(kind is int for kind in types)) if set(types) <= {int, float} else None


def find_starts(layouts: Sequence[Layout], ids: Ids) -> Ids:
    """Where each row begins among the numbers of all rows, and where the last one ends: (rows + 1,)."""
    widths = np.array([len(layout.names) for layout in layouts], np.int64)
    return np.concatenate([[0], np.cumsum(widths[ids])]).astype(np.int64)


def is_exact(layouts: Sequence[Layout], ids: Ids, values: Numbers) -> bool:
    """Whether the places of whole numbers hold whole numbers, and none that may have been rounded."""
    if not any(layout.whole_places for layout in layouts):
        return True
    starts = find_starts(layouts, ids)[:-1]
    for number, layout in enumerate(layouts):
        own = starts[ids == number] if len(layouts) > 1 else starts
        found = values[np.add.outer(own, layout.whole_places)] if layout.whole_places else values[:0]
        if not np.all((np.abs(found) < MAX_EXACT) & (found == np.rint(found))):
            return False
    return True


def read_column(rows: Sequence[Any], name: str) -> Numbers | None:
    """A column of rows that are stored as numbers; None of others."""
    return rows.read_column(name) if isinstance(rows, MetricRows) else None


def list_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """The names of all rows, in the order in which they come."""
    return rows.names if isinstance(rows, MetricRows) else tuple(dict.fromkeys(itertools.chain.from_iterable(rows)))
