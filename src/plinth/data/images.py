"""Image files to the numbers that a vision tower takes: read, resize, crop, normalise, as CLIP does it.

Pillow reads and resizes (the extra `images`); it is imported when the first image is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.config import UserError, read_json, save_json

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
NEAREST, BILINEAR, BICUBIC = 0, 2, 3  # Pillow's numbers, which published configurations use too
KEPT_BYTES = 1 << 30  # images of a data set that stay in memory, as uint8


@dataclass(frozen=True)
class ImageProcessor:
    """What happens to an image before a vision tower sees it; the defaults are CLIP's."""

    resize: int | None = 224
    """pixels of the shorter edge after resizing; the longer one keeps the proportion (None = the size stays)"""
    squash: tuple[int, int] | None = None
    """height and width that every image is resized to whatever its proportion; takes the place of resize"""
    crop: int | None = 224
    """edge in pixels of the square cut from the middle; what an image lacks is filled with black (None = no cut)"""
    pad_to_square: bool = False
    """first fill the shorter edge up with the mean colour, so that nothing is cut off (LLaVA 1.5's option)"""
    resample: int = BICUBIC
    """Pillow's number of the filter: 0 nearest, 2 bilinear, 3 bicubic"""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """subtracted from red, green and blue in 0..1"""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """divides what the mean leaves"""
    factor: float = 1 / 255
    """multiplies a byte before the mean is subtracted"""

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1 pixel.")
        if self.resample not in (NEAREST, BILINEAR, BICUBIC):
            raise UserError(
                f"resample={self.resample} is not supported. Use {NEAREST} (nearest), {BILINEAR} (bilinear) or {BICUBIC} (bicubic)."
            )
        if min(self.std) <= 0:
            raise UserError(f"std={self.std} must be positive.")

    @classmethod
    def for_size(cls, image_size: int) -> ImageProcessor:
        """Return CLIP's for a tower that takes images of `image_size` pixels."""
        return cls(resize=image_size, crop=image_size)

    @classmethod
    def load(cls, folder: Path) -> ImageProcessor:
        """Read the preprocessor_config.json of a model folder. Raises UserError when there is none, or it asks for what we do not do."""
        file = next((folder / name for name in PROCESSOR_FILES if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"{folder} holds no {PROCESSOR_FILES[0]}. Name a model that takes images, with the file that says how.")
        values = read_json(file)
        return cls.from_hf(values.get("image_processor", values), str(file))

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "preprocessor_config.json") -> ImageProcessor:
        """Read a published configuration of an image processor, of CLIP's or LLaVA's kind, old spellings too."""
        size, crop = values.get("size", 224), values.get("crop_size", 224)
        size = {"shortest_edge": size} if isinstance(size, int) else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        resizes, crops = values.get("do_resize", True), values.get("do_center_crop", True)
        squash = (size["height"], size["width"]) if resizes and "height" in size else None
        if resizes and squash is None and set(size) != {"shortest_edge"}:
            raise UserError(f"{where}: size={size} is not supported. Supported: shortest_edge, or height and width.")
        if crops and crop["height"] != crop["width"]:
            raise UserError(f"{where}: crop_size={crop} is not supported. Supported: a square.")
        normalises = values.get("do_normalize", True)
        return cls(
            resize=size["shortest_edge"] if resizes and squash is None else None,
            squash=squash,
            crop=crop["height"] if crops else None,
            pad_to_square=bool(values.get("do_pad")),
            resample=values.get("resample", BICUBIC),
            mean=tuple(values.get("image_mean", cls.mean)) if normalises else (0.0, 0.0, 0.0),
            std=tuple(values.get("image_std", cls.std)) if normalises else (1.0, 1.0, 1.0),
            factor=values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0,
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of preprocessor_config.json."""
        height, width = self.squash or (self.resize, self.resize)
        return {
            "image_processor_type": "LlavaImageProcessor" if self.pad_to_square else "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": self.resize is not None or self.squash is not None,
            "size": {"height": height, "width": width} if self.squash else {"shortest_edge": self.resize or 224},
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "crop_size": {"height": self.crop or 224, "width": self.crop or 224},
            "do_rescale": True,
            "rescale_factor": self.factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_pad": self.pad_to_square,
        }

    def save(self, folder: Path) -> None:
        """Write preprocessor_config.json into a folder, which is made when it is absent."""
        folder.mkdir(parents=True, exist_ok=True)
        save_json(folder / PROCESSOR_FILES[0], self.to_hf())

    def check_size(self, image_size: int) -> None:
        """Raise UserError unless every image comes out as a square of `image_size` pixels."""
        edges = {self.crop} if self.crop is not None else set(self.squash or (None,))
        if edges != {image_size}:
            raise UserError(
                f"the images come out as {self.crop or self.squash} pixels, the vision tower takes {image_size}. Set crop={image_size}."
            )

    @cached_property
    def _table_C256(self) -> np.ndarray:
        """The number that each byte of each channel becomes, fp32; rounded where transformers rounds."""
        scaled = (np.arange(256, dtype=np.float64) * self.factor).astype(np.float32)
        return np.stack([(scaled - np.float32(m)) / np.float32(s) for m, s in zip(self.mean, self.std)])

    def cut(self, image: Any) -> np.ndarray:
        """Resize and crop an RGB image of Pillow's; returns bytes (H, W, 3)."""
        image = _padded_square(image, self.mean, self.factor) if self.pad_to_square else image
        width, height = image.size
        if self.squash is not None:
            image = image.resize(self.squash[::-1], self.resample)
        elif self.resize is not None:
            longer = int(self.resize * max(width, height) / min(width, height))
            image = image.resize((self.resize, longer) if width <= height else (longer, self.resize), self.resample)
        pixels = np.asarray(image)
        return pixels if self.crop is None else _middle(pixels, self.crop)

    def normalise(self, images_NHWC: np.ndarray) -> torch.Tensor:
        """Return bytes (N, H, W, 3) as the tower's input, fp32 (N, 3, H, W)."""
        channels = [self._table_C256[c][images_NHWC[..., c]] for c in range(3)]
        return torch.from_numpy(np.stack(channels, 1))

    def __call__(self, images: Sequence[Path | np.ndarray]) -> torch.Tensor:
        """Return images, files or bytes (H, W, 3), as the tower's input, fp32 (N, 3, H, W)."""
        return self.normalise(np.stack([self.cut(open_image(image)) for image in images]))


def _padded_square(image: Any, mean: Sequence[float], factor: float) -> Any:
    """Return the image in the middle of a square of the mean colour."""
    edge, (width, height) = max(image.size), image.size
    square = _pillow().new("RGB", (edge, edge), tuple(int(m * 255) for m in mean))
    square.paste(image, ((edge - width) // 2, (edge - height) // 2))
    return square


def _middle(pixels_HWC: np.ndarray, edge: int) -> np.ndarray:
    """Cut the square in the middle; black where the image is smaller."""
    height, width = pixels_HWC.shape[:2]
    if height < edge or width < edge:
        larger = np.zeros((max(edge, height), max(edge, width), 3), np.uint8)
        top, left = -(-(larger.shape[0] - height) // 2), -(-(larger.shape[1] - width) // 2)  # the odd line goes before the image
        larger[top : top + height, left : left + width] = pixels_HWC
        # The cut is placed on the original and moved with it, as transformers does.
        top, left = top + (height - edge) // 2, left + (width - edge) // 2
        return larger[max(0, top) : max(0, top) + edge, max(0, left) : max(0, left) + edge]
    top, left = (height - edge) // 2, (width - edge) // 2
    return pixels_HWC[top : top + edge, left : left + edge]


def open_image(image: Path | np.ndarray) -> Any:
    """Return a file, or bytes (H, W, 3), as an RGB image of Pillow's, turned upright as its EXIF data says.

    Raises UserError that names a file that is absent, cut off, or no image.
    """
    pillow = _pillow()
    if isinstance(image, np.ndarray):
        return pillow.fromarray(image)
    if not Path(image).is_file():
        raise UserError(f"{image} does not exist. Name an image file.")
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(image) as opened:
                return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise UserError(f"{image} cannot be read as an image: {error}. Copy it again, or leave it out.") from None


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"reading images needs the package pillow ({error}). Install it: pip install 'plinth-fm[images]'.") from None
    return Image


def save_image(pixels_HWC: np.ndarray, path: Path) -> None:
    """Write bytes (H, W, 3) as the kind of file that the name's suffix says."""
    _pillow().fromarray(pixels_HWC).save(path)


class PixelReader:
    """Reads the images of a data set and keeps the cut bytes of as many as fit; the same file always gives the same numbers."""

    def __init__(self, processor: ImageProcessor, kept_bytes: int = KEPT_BYTES):
        self.processor, self._room = processor, kept_bytes
        self._kept: dict[Path, np.ndarray] = {}

    def __call__(self, images: Sequence[Path]) -> torch.Tensor:
        """Return the tower's input, fp32 (N, 3, H, W)."""
        return self.processor.normalise(np.stack([self._cut(image) for image in images]))

    def _cut(self, image: Path) -> np.ndarray:
        if image in self._kept:
            return self._kept[image]
        pixels = self.processor.cut(open_image(image))
        if self._room >= pixels.nbytes:  # the first images stay: an order that changes from pass to pass gains nothing by exchanging them
            self._room -= pixels.nbytes
            self._kept[image] = np.ascontiguousarray(pixels)
        return pixels
