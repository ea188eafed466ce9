"""Labeled pictures of one size, for classifiers: from arrays, from an .npz file, or from a folder of class folders.

A folder holds one folder per class with the pictures of that class in it (.png, .jpg, ...); reading them needs Pillow
(`lapis[images]`). They are decoded when a batch asks for them, so memory does not grow with the folder. Bytes 0-255
become -1 to 1 (or as `mean` and `std` say); floats are taken as they are.
What augments them is in training/objectives/supervised/classify.py.

Shapes: N pictures, B of a batch, C channels, H height, W width.
"""

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lapis.checkpoint.files import read_json
from lapis.errors import CheckpointError, ConfigError, DataError, MissingExtra
from lapis.parsing import quoted
from lapis.wording import format_count

if TYPE_CHECKING:
    import torch

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Pictures:
    """pixels: [N, C, H, W] of uint8 or float32, or the files to decode. labels, where: of each, the latter for errors.

    shape: C, H, W. mean, std: what bytes (as 0 to 1) are shifted and divided by, per channel or one for all. resize: a
    side in pixels that files are brought to. digest: sha256 of pixels and labels.
    """

    pixels: NDArray[Any] | tuple[Path, ...]
    labels: tuple[str, ...]
    where: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    resize: int | None = None
    digest: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bytes(self) -> bool:
        """Whether they are bytes, which are scaled, and not floats, which are not."""
        return isinstance(self.pixels, tuple) or self.pixels.dtype == np.uint8

    def take(self, numbers: Sequence[int]) -> "torch.Tensor":
        """[B, C, H, W] float32 of these pictures."""
        import torch

        if isinstance(self.pixels, tuple):
            taken = np.stack([_decoded(self.pixels[i], self.resize, self.shape) for i in numbers])
        else:
            taken = self.pixels[np.asarray(numbers, np.int64)]
        pixels = torch.from_numpy(np.ascontiguousarray(taken))
        if taken.dtype != np.uint8:
            return pixels
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


def pictures(
    source: "str | Path | tuple[Any, Any]",
    resize: int | None = None,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
) -> Pictures:
    """Pictures with their labels.

    Args:
        source: (pixels, labels) arrays, an .npz file of these two, or a folder with a folder for each class. Pixels are
            [N, H, W], [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, bytes or floats.
        resize: Brings the files of a folder to this side; else they must be of one size.
        mean: Of each channel, taken away.
        std: Of each channel, divided by.

    Raises:
        DataError: For what is none of these, or damaged.
        MissingExtra: Where Pillow is needed.
    """
    mean, std = tuple(mean), tuple(std)
    if len(mean) not in (1, 3) or len(std) not in (1, 3) or not all(value > 0 for value in std):
        raise ConfigError(f"mean is {list(mean)}, std {list(std)}; expected one number, or three, std above 0")
    if isinstance(source, tuple):
        return _of_arrays(*source, "pixels", mean, std)
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, resize, mean, std)
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path}: pictures are an .npz file with pixels and labels, or a folder with one per class")
    try:
        with np.load(path, allow_pickle=False) as held:
            missing = [name for name in ("pixels", "labels") if name not in held]
            if missing:
                raise DataError(f"{path}: holds {', '.join(held) or 'nothing'}; expected pixels and labels")
            return _of_arrays(held["pixels"], held["labels"], str(path), mean, std)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as .npz: {error}") from None


def scaling(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and std that a vision model's folder asks for: of preprocessor_config.json, 0.5 where it says nothing."""
    path = folder / "preprocessor_config.json"
    held = read_json(path) if path.is_file() else {}
    scales = []
    for name in ("image_mean", "image_std"):
        values = held.get(name, [0.5])
        values = values if isinstance(values, list) else [values]
        if not values or not all(isinstance(value, (int, float)) for value in values):
            raise CheckpointError(f"{path}: {name} is {quoted(values)}; expected a list of numbers")
        scales.append([float(value) for value in values])
    return scales[0], scales[1]


def _of_arrays(pixels: Any, labels: Any, name: str, mean: Numbers, std: Numbers) -> Pictures:
    pixels, labels = np.asarray(pixels), np.asarray(labels)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not len(pixels):
        raise DataError(
            f"{name}: has the shape {pixels.shape}; expected pictures x height x width, with 1 or 3 channels"
        )
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iuU":
        raise DataError(
            f"{name}: {format_count(len(pixels), 'picture')}, labels {labels.shape} of {labels.dtype}; expected one "
            "word or number each"
        )
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind not in "fiu":
            raise DataError(f"{name}: pixels are {pixels.dtype}; expected bytes or floats")
        pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise DataError(
                f"{name}: picture {int((~np.isfinite(pixels)).any((1, 2, 3)).argmax())} holds NaN or infinity"
            )
    names = tuple(str(label) for label in labels.tolist())
    digest = hashlib.sha256(repr((pixels.shape, str(pixels.dtype), names)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    where = tuple(f"{name}, picture {i}" for i in range(len(names)))
    shape = (int(pixels.shape[1]), int(pixels.shape[2]), int(pixels.shape[3]))
    return Pictures(pixels, names, where, shape, mean, std, digest=digest.hexdigest())


def _of_folder(root: Path, resize: int | None, mean: Numbers, std: Numbers) -> Pictures:
    files = sorted(
        path
        for group in root.iterdir()
        if group.is_dir() and not group.name.startswith(".")
        for path in group.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not files:
        raise DataError(f"{root}: holds no folders of pictures ({', '.join(SUFFIXES)}); expected one per class")
    first: tuple[int, int] | None = None
    digest = hashlib.sha256()
    for path in files:
        size = _size(path)
        first = first or size
        if size != first and resize is None:
            raise DataError(
                f"{path}: is {size[0]}x{size[1]} where {files[0].name} is {first[0]}x{first[1]}; "
                "bring all to one size, or give resize=N"
            )
        digest.update(f"{path.relative_to(root)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    assert first is not None
    width, height = (resize, resize) if resize else first
    return Pictures(
        tuple(files),
        tuple(path.parent.name for path in files),
        tuple(map(str, files)),
        (3, height, width),
        mean,
        std,
        resize,
        digest.hexdigest(),
    )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("reading picture files: Pillow", "images") from None
    return Image


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the header alone."""
    image = _pillow()
    try:
        with image.open(path) as opened:
            width, height = opened.size
            return int(width), int(height)
    except (OSError, ValueError, image.DecompressionBombError) as error:
        raise DataError(f"{path}: is no picture that can be read: {error}") from None


def _decoded(path: Path, resize: int | None, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """[3, H, W]"""
    image = _pillow()
    try:
        with image.open(path) as opened:
            rgb = opened.convert("RGB")
            if resize:
                rgb = rgb.resize((resize, resize), image.Resampling.BILINEAR)
            pixels = np.asarray(rgb, np.uint8).transpose(2, 0, 1)
    except (OSError, ValueError, image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded: {error}") from None
    if pixels.shape != shape:
        raise DataError(f"{path}: has changed its size since the run began")
    return pixels
