"""A picture as an array (Pillow). Deterministic, and nothing is cached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from avatar_rl.common.errors import InputError
from avatar_rl.prompts.media.decode import shrunk

_SPARE_ZEROS = 64
_IMAGES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow knows formats that run programs


def decode_image(path: Path, *, max_pixels: int) -> NDArray[np.uint8]:
    """RGB image uint8 (H, W, 3), upright, shrunk to ``max_pixels``.

    It lies on white where it is transparent. 16-bit grey values are scaled to 8 bits. Raises
    InputError for a file that is no readable PNG, JPEG, WebP, BMP, GIF or TIFF image.
    """
    try:
        _check_end(path)
        with Image.open(path, formats=_IMAGES) as image:
            rgb = _on_white(_eight_bits(path, ImageOps.exif_transpose(image)))
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(
            path,
            f"not a readable image ({error})",
            "give a PNG, JPEG, WebP, BMP, GIF or TIFF file, or drop the row",
        ) from error
    size = shrunk(rgb.width, rgb.height, max_pixels)
    return np.asarray(
        rgb if size == rgb.size else rgb.resize(size, Image.Resampling.BICUBIC)
    ).copy()


def _check_end(path: Path) -> None:
    """Raises InputError for a JPEG that ends in zeros: a download that was begun and not ended.
    Pillow decodes them as grey."""
    data = path.read_bytes()
    whole = data.rstrip(b"\0")
    is_jpeg = data.startswith(b"\xff\xd8\xff")
    if is_jpeg and len(data) - len(whole) > _SPARE_ZEROS and not whole.endswith(b"\xff\xd9"):
        raise InputError(
            path,
            f"is cut short: its last {len(data) - len(whole)} bytes are zeros",
            "copy or download the file again, or drop the row",
        )


def _eight_bits(path: Path, image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits scaled down; Pillow's own conversion makes them white."""
    if image.mode not in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        return image
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((values.astype(np.uint32) * 255 // 65535).astype(np.uint8))
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if low >= 0 and high <= 255:
        return Image.fromarray(values.astype(np.uint8))
    raise InputError(
        path,
        f"has grey values from {low:g} to {high:g}, and nothing says which is white",
        "save it with 8 or 16 bits per value",
    )


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, composed as vLLM's own loader does.

    Converting alone would show the colour under the transparency.
    """
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    rgb = Image.new("RGB", image.size, "white")
    rgb.paste(layer, mask=layer.getchannel("A"))
    return rgb
