"""The work folder of a run, of one process or of several that see one folder.

The first process writes what was fitted, which is the same in all. Each writes the values that cross a border in its
own share of the data, and removes earlier ones when all have written. So whenever a run is killed, there is a border
that all processes have, and it goes on behind the last such.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from parofx.calibration.processes import process_index, tell, together
from parofx.calibration.store import CalibrationStore


class SharedStore:
    """What `CalibrationStore` keeps, for all processes.

    Args:
        folder: as for `CalibrationStore`; so are `fingerprint` and `resume`.
        fingerprint: see there.
        resume: see there.

    Raises:
        DataError: as there, in all processes.
    """

    def __init__(self, folder: str, fingerprint: str, *, resume: bool) -> None:
        here = process_index()
        # The first one makes the folder, or starts it over; the others find it as that leaves it.
        for turn in (here == 0, here > 0):
            with together():
                if turn:
                    self._store = CalibrationStore(folder, fingerprint, resume=resume or here > 0, process=here)
        told = tell(json.dumps(self._store.borders()))
        #: How many segments are finished, counted from the first.
        self.finished = 1 + max(set.intersection(*(set(json.loads(one)) for one in told)), default=-1)

    def load_segment(self, index: int) -> tuple[dict[str, Tensor], Any]:
        """Return the fitted tensors of a finished segment, and what was noted with them."""
        return self._store.load_segment(index)

    def load_borders(self) -> list[dict[str, Any]]:
        """Return this process's values behind the last finished segment."""
        return self._store.load_borders(self.finished - 1)

    def save_segment(self, index: int, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Write a segment's fitted tensors, if this is the first process."""
        if process_index() == 0:
            self._store.save_segment(index, tensors, notes)

    def save_borders(self, index: int, borders: Sequence[Mapping[str, Any]]) -> None:
        """Write this process's values behind segment `index`, which is then finished."""
        with together():
            self._store.save_borders(index, borders)
        self._store.keep_borders(index)
