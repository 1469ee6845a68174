"""Augmentation of images by Pillow, with the settings of timm; mixing of batches.

RandAugment: https://arxiv.org/abs/1909.13719; mixup: https://arxiv.org/abs/1710.09412;
CutMix: https://arxiv.org/abs/1905.04899; random erasing: https://arxiv.org/abs/1708.04896.
By hand, since those of timm and torchvision bring PyTorch along.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

BICUBIC = Image.Resampling.BICUBIC
GRAY = 128  # what comes in from outside of an image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central seven eighths of the shorter side, as a square of `size` pixels."""
    side = 0.875 * min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    return image.resize((size, size), BICUBIC, (left, top, left + side, top + side))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A square of `size` from a part of the image: 8 % to all of it, 3:4 to 4:3; maybe flipped."""
    width, height = image.size
    for _ in range(10):
        area = rng.uniform(0.08, 1) * width * height
        ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            image = image.resize((size, size), BICUBIC, (left, top, left + w, top + h))
            break
    else:
        image = center_crop(image, size)
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def rand_augment(
    image: Image.Image, magnitude: float, deviation: float, rng: np.random.Generator
) -> Image.Image:
    """Two operations, each with probability 1/2, at a magnitude of 0 to 10 that varies."""
    for operation in rng.choice(np.array(OPERATIONS, object), 2):
        if rng.random() < 0.5:
            strength = np.clip(rng.normal(magnitude, deviation), 0, 10) / 10
            image = operation(image, float(strength), rng.choice([-1, 1]))
    return image


Operation = Callable[[Image.Image, float, int], Image.Image]


def _affine(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Operation:
    """Moves each pixel (x, y) to where the matrix has it come from."""

    def apply(image: Image.Image, strength: float, sign: int) -> Image.Image:
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix(sign * strength, image),
            BICUBIC,
            fillcolor=(GRAY,) * len(image.getbands()),
        )

    return apply


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


def _rotate(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return image.rotate(sign * 30 * strength, BICUBIC, fillcolor=(GRAY,) * len(image.getbands()))


def _solarize_add(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return image.point(lambda x: min(255, x + 110 * strength) if x < 128 else x)


OPERATIONS: list[Operation] = [
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: ImageOps.invert(image),
    lambda image, strength, sign: ImageOps.posterize(image, max(1, 4 - int(4 * strength))),
    lambda image, strength, sign: ImageOps.solarize(image, 256 - int(256 * strength)),
    _solarize_add,
    _rotate,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _affine(lambda s, image: (1, 0.3 * s, 0, 0, 1, 0)),
    _affine(lambda s, image: (1, 0, 0, 0.3 * s, 1, 0)),
    _affine(lambda s, image: (1, 0, 0.45 * s * image.width, 0, 1, 0)),
    _affine(lambda s, image: (1, 0, 0, 0, 1, 0.45 * s * image.height)),
]


def random_erasing(pixels: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Puts noise in place of a rectangle, 2 % to 33 % of an image (height, width, channels)."""
    height, width, channels = pixels.shape
    if rng.random() < probability:
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            ratio = math.exp(rng.uniform(-1, 1) * math.log(10 / 3))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = rng.integers(height - h), rng.integers(width - w)
                noise = rng.normal(118, 58, (h, w, channels)).clip(0, 255)
                pixels = pixels.copy()
                pixels[top : top + h, left : left + w] = noise
                break
    return pixels


def mix(
    images: np.ndarray,
    targets: np.ndarray,
    mixup: float,
    cutmix: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Mixes neighbors in a batch, by mixup or by CutMix, with equal probability.

    The first with the second and so on, so that the even parts of a batch are mixed as it is.

    Args:
        images: uint8 (batch, height, width, channels).
        targets: float32 (batch, classes).
        mixup: The share of an image is drawn from Beta(mixup, mixup); 0 for no mixup.
        cutmix: The same for CutMix.
        rng: Draws the kind, the share and the place.
    """
    alphas = {kind: a for kind, a in (("mixup", mixup), ("cutmix", cutmix)) if a}
    if not alphas:
        return images, targets
    neighbors = np.minimum(np.arange(len(images)) ^ 1, len(images) - 1)
    kind = rng.choice(list(alphas))
    share = rng.beta(alphas[kind], alphas[kind])
    if kind == "mixup":
        blend = share * images.astype(np.float32) + (1 - share) * images[neighbors]
        mixed = blend.round().astype(np.uint8)
    else:
        height, width = images.shape[1:3]
        sides = np.round(math.sqrt(1 - share) * np.array([height, width])).astype(int)
        center = rng.integers([height, width])
        top, left = np.clip(center - sides // 2, 0, [height, width])
        bottom, right = np.clip(center - sides // 2 + sides, 0, [height, width])
        mixed = images.copy()
        mixed[:, top:bottom, left:right] = images[neighbors, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, (share * targets + (1 - share) * targets[neighbors]).astype(np.float32)
