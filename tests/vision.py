"""Tiny vision-language models, and images for them."""

from io import BytesIO

import numpy as np
from PIL import Image

from millrace.train.tiny_vision import KINDS, make_tiny_vision_model, make_tiny_vision_tokenizer

__all__ = ["KINDS", "make_image", "make_tiny_vision_model", "make_tiny_vision_tokenizer", "png"]


def make_image(seed: int = 0, *, width: int = 56, height: int = 56) -> Image.Image:
    """Returns an image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    """Returns the content of an image file."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
