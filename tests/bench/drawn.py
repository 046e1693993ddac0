"""Pictures to time and judge training on, as two worlds hold them: PNG files, and rows of uint8.

In: how many, of which size; or the folder of a real set. Out: `Shown`. The invented ones have eight known classes (one bone or
two, with or without a joint, with or without a hole in the cortex), which nothing but the probe is told. A bone is a tube: the
grey value is what its wall and its marrow take from the ray, as in a radiograph.
"""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = 8
EXPORT_PX = 512
"""Side of the PNG files."""
SEED = 20260117

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Shown:
    """The same pictures in two ways, in one order."""

    files: tuple[Path, ...]
    """PNG."""
    cache: Path
    """(n, S, S) uint8, without a header."""
    size_px: int
    targets: tuple[int, ...]
    patients: tuple[str, ...]

    def mapped(self) -> Grey:
        """Map the rows from the disk."""
        rows = np.memmap(self.cache, np.uint8, "r")
        return rows.reshape(-1, self.size_px, self.size_px)

    @property
    def ids(self) -> tuple[str, ...]:
        """What the random draws hang on."""
        return tuple(file.stem for file in self.files)


def invented(folder: Path, count: int, size_px: int, say: Callable[[str], None]) -> Shown:
    """Draw pictures of the eight classes, each of a patient of its own; what the folder already has stays."""
    place = folder / "invented"
    place.mkdir(exist_ok=True)
    files = tuple(place / f"{number:05d}.png" for number in range(count))
    for number, file in enumerate(files):
        if not file.exists():
            say(f"drawing picture {number + 1} of {count}")
            Image.fromarray(radiograph(np.random.default_rng((SEED, number)), number % CLASSES)).save(file)
    return _shown(folder, files, size_px, [number % CLASSES for number in range(count)], [file.stem for file in files])


def knees(folder: Path, data: Path, count: int, size_px: int) -> Shown:
    """Take real radiographs of knees, one a patient, as many of Kellgren-Lawrence 0 and 1 as of 3 and 4: two classes.

    `data` holds `knee_kl` with its `labels.csv` (file, kl, patient) and `images.tar`.
    """
    with (data / "knee_kl" / "labels.csv").open(newline="", encoding="utf-8") as table:
        of_patient = {row["patient"]: row for row in csv.DictReader(table) if row["kl"] != "2"}
    severe = [row for row in of_patient.values() if int(row["kl"]) > 2]
    mild = [row for row in of_patient.values() if int(row["kl"]) < 2]
    mixed = np.random.default_rng(SEED)
    each = min(count // 2, len(severe), len(mild))
    rows = [some[at] for some in (severe, mild) for at in sorted(mixed.permutation(len(some))[:each])]
    place = folder / "knees"
    place.mkdir(exist_ok=True)
    wanted = {row["file"]: place / f"{Path(row['file']).stem}.png" for row in rows}
    with tarfile.open(data / "knee_kl" / "images.tar") as archive:
        for member in archive:
            if member.name in wanted and (file := archive.extractfile(member)) is not None:
                Image.open(io.BytesIO(file.read())).convert("L").save(wanted[member.name])
    targets = [int(int(row["kl"]) > 2) for row in rows]
    return _shown(folder, tuple(wanted[row["file"]] for row in rows), size_px, targets, [row["patient"] for row in rows])


def radiograph(chance: np.random.Generator, kind: int) -> Grey:
    """Draw one picture of a class (0…7)."""
    two, joint, hole = kind & 1, kind & 2, kind & 4
    down, right = np.mgrid[:EXPORT_PX, :EXPORT_PX].astype(np.float32) / EXPORT_PX - 0.5
    tilt = chance.uniform(-0.4, 0.4)
    across = right * np.cos(tilt) + down * np.sin(tilt) - chance.uniform(-0.06, 0.06)
    along = down * np.cos(tilt) - right * np.sin(tilt)
    film = 0.5 * _tube(across, chance.uniform(0.17, 0.24))  # soft tissue
    gap = chance.uniform(-0.12, 0.12)
    middles = chance.uniform(0.055, 0.075) * np.array([-1, 1]) if two else np.zeros(1)
    holed = chance.integers(len(middles))
    for number, middle in enumerate(middles):
        radius = chance.uniform(0.03, 0.042) if two else chance.uniform(0.042, 0.058)
        wide = radius * (1 + 0.4 * np.exp(-np.square((along - gap) / 0.06))) if joint else np.full_like(along, radius)
        wall = 3.5 * (_tube(across - middle, wide) - 0.8 * _tube(across - middle, 0.65 * wide))
        if joint:
            wall *= np.abs(along - gap) > 0.009
        if hole and number == holed:
            at = chance.choice((-1, 1)) * chance.uniform(0.16, 0.3)
            far = np.square((across - middle) / 0.6) + np.square(along - at)
            wall *= 1 - 0.85 * np.exp(-far / chance.uniform(0.02, 0.035) ** 2)
        film += wall
    film = film * chance.uniform(650, 1000) + chance.uniform(4, 24)
    film += chance.standard_normal(film.shape, dtype=np.float32) * 4
    return np.clip(film, 0, 255).astype(np.uint8)


def resized(image: Image.Image, size_px: int) -> Grey:
    """Give a picture as a row of the cache."""
    return np.asarray(image.convert("L").resize((size_px, size_px), Image.Resampling.BILINEAR, reducing_gap=2.0))


def _tube(across: NDArray[np.floating], radius: NDArray[np.floating] | float) -> NDArray[np.floating]:
    """Give how long a ray is inside a cylinder that it meets so far from the axis."""
    return 2 * np.sqrt(np.clip(np.square(radius) - np.square(across), 0, None))


def _shown(folder: Path, files: tuple[Path, ...], size_px: int, targets: Iterable[int], patients: Iterable[str]) -> Shown:
    cache = folder / f"{files[0].parent.name}-{len(files)}-{size_px}.cache"
    with cache.open("wb") as out:
        for file in files:
            with Image.open(file) as image:
                out.write(resized(image, size_px).tobytes())
    return Shown(files, cache, size_px, tuple(targets), tuple(patients))
