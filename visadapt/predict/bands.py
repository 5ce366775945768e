"""Which bands of a file are those of a model, found as the data set of its training found them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..datasets.raster_files import constant
from ..errors import InputError, counted


class UnsuitableImage(InputError):
    """An image that is not what the model takes; others may be."""


def listed(names: Sequence[str | None]) -> str:
    return ", ".join(name or "unnamed" for name in names)


@dataclass(frozen=True)
class Bands:
    """How the bands of files become those of a model; see `visadapt.datasets.raster.RasterSegDataset`.

    Attributes:
        count: bands that the model takes.
        names: theirs, None where they have none.
        file_bands: names of the bands in files that do not name them.
        nodata: the value without data, in place of what files say.
        fill: the value of bands that a file does not have; None makes such a file an error.
    """

    count: int
    names: Sequence[str] | None = None
    file_bands: Sequence[str] | None = None
    nodata: float | None = None
    fill: float | None = None

    @property
    def given(self) -> bool:
        """The data set was told something about its files, beyond what they say themselves."""
        return any(value is not None for value in (self.file_bands, self.nodata, self.fill))

    @property
    def real(self) -> list[int]:
        """Bands of the model that are in files whose bands have no names; the others are filled."""
        if self.file_bands is None or self.names is None:
            return [*range(self.count)]
        return [i for i, name in enumerate(self.names) if name in self.file_bands]

    def places(
        self, path: str | Path, names: Sequence[str | None], alpha: Sequence[int] = ()
    ) -> tuple[list[int | None], Sequence[str] | None]:
        """Where in a file the bands of the model are.

        Bands are taken by name where both sides have names. In a file without names they are taken to be `file_bands`
        or else the model's own, whichever are as many, if need be without an alpha band.

        Args:
            path: the file, for errors.
            names: of its bands, None for each that has none.
            alpha: places of alpha bands.

        Returns:
            For each band of the model its place from 0, None where it is filled; and the names that the bands of the
            file were taken to have, None where they have names of their own or nobody has.

        Raises:
            UnsuitableImage: there are other bands, or another number of them.
        """
        found, taken = [*range(len(names))], None
        if not (self.names and any(names)):
            counts = self.count, len(self.file_bands or ())
            if len(found) not in counts:
                found = [i for i in found if i not in alpha]
            taken = self.file_bands if len(found) == counts[1] else self.names
            if not found or len(found) not in counts:
                raise UnsuitableImage(f"{path} has {self._counted(names)} and the model takes {self._wanted()}")
            if not taken or not self.names:
                return found, None
            names = taken
        where = dict(reversed([*zip(names, found)]))  # of equal names the first
        missing = [name for name in self.names if name not in where]
        if missing and (self.fill is None or len(missing) == self.count):
            raise UnsuitableImage(
                f"{path} has the bands {listed(names)} and the model takes {listed(self.names)}; "
                f"missing: {listed(missing)}"
            )
        return [where.get(name) for name in self.names], taken

    def _counted(self, names: Sequence[str | None]) -> str:
        return counted(len(names), "band") + (f" ({listed(names)})" if any(names) else "")

    def _wanted(self) -> str:
        own = f"{self.count}" + (f" ({listed(self.names)})" if self.names else "")
        return own + (f" of {len(self.file_bands)} ({listed(self.file_bands)})" if self.file_bands else "")

    def filled(self, values: np.ndarray, places: Sequence[int | None]) -> np.ndarray:
        """All bands (C, H, W) of the model, from those (c, H, W) that the file has.

        Raises:
            UnsuitableImage: the type of the values cannot hold `fill`.
        """
        if None not in places:
            return values
        try:
            rest, blank = iter(values), constant(self.fill, values.shape[1:], values.dtype)
        except InputError as error:
            raise UnsuitableImage(str(error)) from error
        return np.stack([blank if place is None else next(rest) for place in places])
