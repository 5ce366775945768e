"""A strict bridge to albumentations.

albumentations only warns about an argument it does not know, clips float images to [0, 1] in its pixel transforms, and
gives every transform of a pipeline the same stream when seeded by `set_random_seed` (two flips of p=0.5 then always
come together). Here the first two are errors, and all transforms draw from one shared stream.

A mask beside the image goes through the same draw. Some transforms fill it with 0, which is a class, and not all of
them let one choose; so labels are moved up by one on their way in, which makes 0 stand for ignored pixels.
"""

from __future__ import annotations

import inspect
import json
import random
import warnings
from collections.abc import Iterator
from typing import Any

import albumentations as A
import cv2
import numpy as np

from ..errors import InputError, hint
from ..ignored import IGNORED
from ..registry import TRANSFORMS, unknown_arguments
from .clips import RandAugment
from .crops import BalancedCrop
from .resize import BicubicResize

GROUPS = {"OneOf": A.OneOf, "RandomOrder": A.RandomOrder, "Sequential": A.Sequential, "SomeOf": A.SomeOf}
# The model normalises on the device with the backbone's own statistics; doing it here as well would do it twice.
REFUSED = {
    **dict.fromkeys(("Normalize", "ToFloat", "FromFloat"), "the model normalises its input itself; leave it out"),
    **dict.fromkeys(("ToTensorV2", "ToTensor3D"), "images become tensors after the last transform; leave it out"),
    "ToRGB": "the number of bands is the data set's `channels`; leave it out",
    "Lambda": "a function cannot be stored with the model; use a transform class",
    **dict.fromkeys(
        ("AtLeastOneBBoxRandomCrop", "BBoxSafeRandomCrop", "RandomSizedBBoxSafeCrop", "CropNonEmptyMaskIfExists"),
        "it needs boxes or masks; use RandomResizedCrop, or BalancedCrop for masks",
    ),
    "ConstrainedCoarseDropout": "it needs boxes or masks; use CoarseDropout",
}
# Arguments about masks. What a mask holds are names and no quantities: nothing lies between two of them.
MASK_FILLS, NEAREST = ("fill_mask", "mask_drop_value"), (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT)
# At p=1 the outcome depends on the image alone, unless a size or a position is drawn.
DETERMINISTIC = {"CenterCrop", "Crop", "Pad", "PadIfNeeded", "ToGray"}
DETERMINISTIC |= {"BicubicResize", "LongestMaxSize", "Resize", "SmallestMaxSize"}


def _leaf_classes() -> dict[str, type]:
    abstract = {A.BasicTransform, A.DualTransform, A.ImageOnlyTransform, A.Transform3D}
    named = {n: c for n, c in vars(A).items() if inspect.isclass(c) and issubclass(c, A.BasicTransform)}
    leaves = {n: c for n, c in named.items() if not issubclass(c, A.Transform3D) and n not in REFUSED}
    return {n: c for n, c in leaves.items() if c not in abstract} | {
        "BalancedCrop": BalancedCrop,
        "BicubicResize": BicubicResize,
        "RandAugment": RandAugment,
    }


LEAVES = _leaf_classes()


@TRANSFORMS.register_module()
class Albu:
    """Runs a list of albumentations transforms on one image, and on its mask if it has one.

    Args:
        transforms: entries such as `dict(type='Resize', height=224, width=224)`; `type` is the name of a class of
            albumentations 2.0.8, BalancedCrop, BicubicResize or RandAugment. OneOf, SomeOf, Sequential and RandomOrder
            hold a nested list `transforms`.
        channels: bands of the images; every pixel transform is tried on such an image when the pipeline is built.

    Raises:
        InputError: an unknown transform or argument, a value that albumentations refuses, a transform that cannot work
            on `channels` bands, or one that must not stand here, such as Normalize.
    """

    def __init__(self, transforms: list[dict], channels: int = 3):
        self._json = _plain(transforms)
        self.channels = channels
        self.compose = A.Compose([_build(entry, f"transform[{i}]") for i, entry in enumerate(self._json)])
        self.names = [name for name, _ in _leaves(self.compose)]
        self._pixel = [(n, t) for n, t in _leaves(self.compose) if isinstance(t, A.ImageOnlyTransform)]
        for name, leaf in self._pixel:
            _try(name, leaf, channels)

    @property
    def is_random(self) -> bool:
        """False if the same image always gives the same result, so that what a model makes of it can be kept."""
        return any(_is_random(t) for t in self.compose.transforms)

    def to_json(self) -> list[dict[str, Any]]:
        """The entries as JSON values; `Albu(a.to_json())` equals `a`."""
        return json.loads(json.dumps(self._json))

    def __call__(
        self, image: np.ndarray, seed: int, mask: np.ndarray | None = None
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Transform one image, and its mask in the same way.

        Args:
            image: (H, W, C), uint8 or float.
            seed: decides every random choice.
            mask: (H, W) uint8, class indices and 255 for ignored pixels. Its pixels are moved, never mixed, and what is
                filled in is 255.

        Returns:
            (H', W', C) of the same type; with a mask, a pair of it and the mask (H', W').

        Raises:
            InputError: the image has another number of bands or the mask another size, or a transform cannot work on
                them.
        """
        if image.ndim != 3 or image.shape[2] != self.channels:
            raise InputError(
                f"transforms were built for {self.channels} bands, this image is {image.shape} (H, W, bands)"
            )
        if image.dtype != np.uint8 and self._pixel:
            raise InputError(
                f"transform {self._pixel[0][0]} works on 8-bit images only: albumentations would clip these "
                f"{image.dtype} values to [0, 1]; use geometric transforms, or convert the images"
            )
        targets = {"image": np.ascontiguousarray(image)}
        if mask is not None:
            self._check_mask(image, mask)
            targets["mask"] = mask + np.uint8(1)  # 255 becomes 0
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        try:
            out = self.compose(**targets)
        except Exception as error:  # albumentations derives some of its errors from Exception itself
            raise InputError(
                f"transforms fail on an image of {image.shape} (H, W, bands): {_one_line(error)}"
            ) from error
        return out["image"] if mask is None else (out["image"], out["mask"] - np.uint8(1))

    def _check_mask(self, image: np.ndarray, mask: np.ndarray) -> None:
        if "RandAugment" in self.names:
            raise InputError("transform RandAugment would move images and leave their masks; leave it out")
        if mask.shape != image.shape[:2] or mask.dtype != np.uint8:
            raise InputError(
                f"a mask is uint8 and of its image's size: this one is {mask.dtype} {mask.shape}, the image is "
                f"{image.shape[:2]} (H, W)"
            )
        if "Morphological" in self.names:
            raise InputError("transform Morphological would grow the classes of a mask by their index; leave it out")


def _plain(transforms: Any) -> list[dict[str, Any]]:
    """Entries as plain JSON values, whatever mapping and sequence types they were written in."""
    if not isinstance(transforms, list | tuple):
        raise InputError(f"transforms are a list of dict(type=...), got {type(transforms).__name__}")

    def refuse(value: Any) -> Any:
        raise InputError(f"transforms are stored with the model, so each value must be JSON; got {value!r}")

    return json.loads(json.dumps(list(transforms), default=refuse))


def _build(entry: Any, where: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        raise InputError(f"{where} must be dict(type='Name', ...), got {entry!r}")
    name = entry["type"]
    if name in REFUSED:
        raise InputError(f"{where}: {name} has no place here: {REFUSED[name]}")
    cls = GROUPS.get(name) or LEAVES.get(name)
    if cls is None:
        raise InputError(f"{where}: albumentations has no transform '{name}'{hint(name, [*LEAVES, *GROUPS])}")
    kwargs = {k: v for k, v in entry.items() if k != "type"}
    for problem in unknown_arguments(cls, kwargs):
        raise InputError(f"{where}: {problem}")
    if name in GROUPS:
        nested = kwargs.get("transforms")
        if not isinstance(nested, list) or not nested:
            raise InputError(f"{where}: {name} needs transforms=[dict(type=...), ...]")
        kwargs["transforms"] = [_build(e, f"{where}.transforms[{i}]") for i, e in enumerate(nested)]
    kwargs = _about_masks(kwargs, f"{where}: {name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            transform = cls(**kwargs)
    except (ValueError, TypeError, UserWarning) as error:
        raise InputError(f"{where}: {name}: {_one_line(error)}") from error
    if set(getattr(transform, "targets_as_params", ())) - ({"mask"} if name == "BalancedCrop" else set()):
        raise InputError(
            f"{where}: {name} needs {', '.join(transform.targets_as_params)} beside the image; leave it out"
        )
    return transform


def _about_masks(kwargs: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of a transform, with its fill of masks turned into what stands for ignored pixels inside of `Albu`."""
    for name in (n for n in MASK_FILLS if kwargs.get(n) is not None):
        if kwargs[name] != IGNORED:
            raise InputError(f"{where}: {name} must be {IGNORED}, which is ignored, got {kwargs[name]!r}")
        kwargs = {**kwargs, name: 0}
    if kwargs.get("mask_interpolation", cv2.INTER_NEAREST) not in NEAREST:
        raise InputError(f"{where}: mask_interpolation would mix labels; leave it out, masks take the nearest label")
    return kwargs


def _one_line(error: Exception) -> str:
    """The message of an error; a list of pydantic's findings becomes 'argument: finding; ...'."""
    findings = getattr(error.__cause__, "errors", None)
    if callable(findings):
        return "; ".join(f"{'.'.join(map(str, f['loc'])) or 'arguments'}: {f['msg']}" for f in findings())
    return " ".join(str(error).split())


def _leaves(group: Any) -> Iterator[tuple[str, Any]]:
    for transform in group.transforms:
        if isinstance(transform, A.BaseCompose):
            yield from _leaves(transform)
        else:
            yield type(transform).__name__, transform


def _try(name: str, leaf: Any, channels: int) -> None:
    """Run one pixel transform with certainty; it might otherwise fail only after hours, when its turn comes."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64, channels), dtype=np.uint8)
    p, leaf.p = leaf.p, 1.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = A.Compose([leaf])(image=image)["image"]
    except Exception as error:
        raise InputError(f"transform {name} does not work on images of {channels} bands: {_one_line(error)}") from error
    finally:
        leaf.p = p
    if out.shape != image.shape:
        raise InputError(f"transform {name} turns images of {channels} bands into {out.shape}; mend its arguments")


def _is_random(transform: Any) -> bool:
    if transform.p == 0 or isinstance(transform, A.NoOp):
        return False
    if isinstance(transform, A.Sequential):
        return transform.p < 1 or any(_is_random(t) for t in transform.transforms)
    drawn = "random" in (getattr(transform, "position", ""), getattr(transform, "pad_position", ""))
    drawn = drawn or isinstance(getattr(transform, "max_size", None), list | tuple)
    return transform.p < 1 or drawn or type(transform).__name__ not in DETERMINISTIC
