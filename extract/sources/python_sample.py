"""One sample of a torch data set, told by its form alone.

A mapping with ``image`` and ``label`` or ``mask`` (torchgeo), or a pair of image and target (torchvision).
Arrays may be tensors, numpy arrays or Pillow images. Shapes: B bands, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from satdifuser.errors import ImageError
from satdifuser.extract.sources.tile import Label, Task
from satdifuser.labels.classes import MAX_CLASSES

MOST_CHANNELS = 4  # an image as narrow as that is one whose channels come last


@dataclass(frozen=True)
class Sample:
    """An image with its target, if there is one."""

    image: NDArray[np.generic]  # (B, H, W)
    label: Label = None
    mask: NDArray[np.generic] | None = None  # (H, W), values as the data set has them

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) px."""
        _, height, width = self.image.shape
        return height, width

    @property
    def task(self) -> Task | None:
        """What the target is for."""
        if self.mask is not None:
            return "segmentation"
        if self.label is None:
            return None
        return "multilabel" if isinstance(self.label, tuple) else "classification"


def parse_sample(raw: Any, where: str) -> Sample:
    """Read a sample as the data set returned it.

    Args:
        raw: The sample.
        where: Names it in messages.

    Raises:
        ImageError: it is of another form than this module describes.
    """
    fields = to_fields(raw, where)
    image, label, mask = (fields.get(name) for name in ("image", "label", "mask"))
    if image is None:
        raise ImageError(f"{where}: has no 'image', it has {', '.join(map(str, fields)) or 'nothing'}")
    if label is not None and mask is not None:
        raise ImageError(f"{where}: has both 'label' and 'mask', expected one; let the target return one")
    pixels = parse_image(image, where)
    return Sample(
        image=pixels,
        label=None if label is None else parse_label(label, where),
        mask=None if mask is None else parse_mask(mask, pixels, where),
    )


def to_fields(raw: Any, where: str) -> Mapping[Any, Any]:
    """Return a sample as a mapping; the target of a pair is a mask if it has two dimensions or more.

    Raises:
        ImageError: it is neither a mapping nor a pair.
    """
    if isinstance(raw, Mapping):
        return raw
    if isinstance(raw, tuple | list) and len(raw) == 2:
        image, target = raw
        flat = target is None or to_array(target, "target", where).ndim < 2
        return {"image": image, "label" if flat else "mask": target}
    count = f" of {len(raw)}" if isinstance(raw, tuple | list) else ""
    raise ImageError(
        f"{where}: is of an unknown form ({type(raw).__name__}{count}); expected a dict with "
        "'image' and 'label' or 'mask', or a pair (image, target)"
    )


def to_array(value: Any, what: str, where: str) -> NDArray[np.generic]:
    """Return the numbers of a tensor, an array, a Pillow image or a plain number.

    Raises:
        ImageError: they are not numbers.
    """
    try:
        array = value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise ImageError(f"{where}: its {what} cannot be read as an array ({error})") from error
    if array.dtype.kind not in "biuf":
        raise ImageError(
            f"{where}: its {what} is of type {type(value).__name__} ({array.dtype}); expected numbers in a "
            "tensor, a numpy array or a Pillow image"
        )
    return array


def parse_image(value: Any, where: str) -> NDArray[np.generic]:
    """Return an image as (B, H, W); those of Pillow have their channels last."""
    image = to_array(value, "image", where)
    if isinstance(value, Image):
        return np.moveaxis(np.atleast_3d(image), -1, 0)
    if image.ndim != 3 or not image.size:
        raise ImageError(f"{where}: its image is of shape {image.shape}, expected (bands, height, width)")
    if image.shape[2] <= MOST_CHANNELS < image.shape[1]:
        raise ImageError(
            f"{where}: its image is of shape {image.shape}, which looks like (height, width, bands); "
            "expected (bands, height, width)"
        )
    return image


def parse_mask(value: Any, image: NDArray[np.generic], where: str) -> NDArray[np.generic]:
    """Return a mask as (H, W)."""
    mask = to_array(value, "mask", where)
    flat = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
    if flat.shape != image.shape[1:]:
        height, width = image.shape[1:]
        raise ImageError(
            f"{where}: its mask is of shape {mask.shape}, but its image is of {image.shape}; expected "
            f"({height}, {width}) or (1, {height}, {width})"
        )
    return flat


def parse_label(value: Any, where: str) -> int | tuple[int, ...]:
    """Return a class index, or 0 or 1 for each class."""
    label = to_array(value, "label", where)
    whole = label.dtype.kind in "biu"
    if whole and label.size == 1 and label.ndim < 2 and label.item() in range(MAX_CLASSES):
        return int(label.item())
    if label.ndim == 1 and 1 < label.size <= MAX_CLASSES and np.isin(label, (0, 1)).all():
        return tuple(map(int, label.tolist()))
    raise ImageError(
        f"{where}: its label is {label.tolist()!r:.80}; expected a whole number of 0 to {MAX_CLASSES - 1}, "
        f"or 0 or 1 for each of at most {MAX_CLASSES} classes"
    )
