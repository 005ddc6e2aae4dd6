"""Images of data sets and environments, read into the parts of chat messages. Pillow is imported only for images."""

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from millrace.arguments import shown
from millrace.imports import needs_extra
from millrace.rollout.sample import Message

MARK = "<image>"  # verl's place of an image in a text
SOURCES = ("image", "image_url", "url", "path", "bytes")  # the keys of an image part that may hold the image
ORIENTATION = 0x0112  # of EXIF: how to turn an image
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # that engines take


def read_image(value: Any, folder: Path) -> bytes:
    """Return an image as the content of an image file.

    value: a path, a data URL, the content of an image file, a PIL image, or a mapping with one of these as `bytes`,
    `path` or `url`. folder: where relative paths begin. Transparent pixels become white, rotated photos upright, films
    their first picture, and other formats PNG, because engines and trainers would treat them differently. Other files
    stay as they are.

    Raises ValueError, in one line, if it is no image, and ConfigError without Pillow.
    """
    match value:
        case Mapping() if found := [value[key] for key in ("bytes", "path", "url") if value.get(key) is not None]:
            return read_image(found[0], folder)
        case str() if value.startswith("data:"):
            return _plain(_data(value), f"the data URL {shown(value[:40])}")
        case str() if value.startswith(("http://", "https://")):
            raise ValueError(f"the image {value} is on the web; download it, and give its path")
        case str() | Path():
            path = folder / str(value).removeprefix("file://")
            try:
                return _plain(path.read_bytes(), f"the image {path}")
            except OSError as error:
                raise ValueError(f"the image {path} can't be read: {error.strerror or error}") from error
        case bytes():
            return _plain(value, f"an image of {len(value)} bytes")
        case _ if hasattr(value, "save"):
            file = BytesIO()
            value.save(file, "PNG")
            return _plain(file.getvalue(), "an image")
    raise ValueError(f"an image is {shown(value)}; it must be a path, a data URL, an image file's bytes or a PIL image")


def read_messages(messages: Sequence[Message], images: Sequence[bytes], folder: Path) -> list[Message]:
    """Return messages with their images as the contents of image files. Text without images becomes one string.

    images: those of the row's column. They fill, in order, the parts `{"type": "image"}` without an image of their own,
    and the marks `<image>` in texts. If there is neither, they come before the text of the first user message.

    Raises ValueError, in one line, if a content has another form, an image can't be read, or the numbers of images and
    of places for them differ.
    """
    contents = [_parts(message.get("content"), bool(images)) for message in messages]
    empty = sum(part["type"] == "image" and _source(part) is None for parts in contents for part in parts)
    if images and not empty:
        users = [parts for parts, message in zip(contents, messages, strict=True) if message.get("role") == "user"]
        if not users:
            raise ValueError("the row has images, and the prompt has no message of a user for them")
        users[0][:0] = [{"type": "image"} for _ in images]
    elif empty != len(images):
        raise ValueError(f"the prompt has places for {empty} images, and the row has {len(images)}")
    rest = iter(images)
    return [
        {**message, "content": _joined(parts, rest, folder)} for parts, message in zip(contents, messages, strict=True)
    ]


def _parts(content: object, marks: bool) -> list[dict[str, Any]]:
    """Return a content as parts. marks: whether `<image>` in a text is the place of an image."""
    match content:
        case str():
            texts = content.split(MARK) if marks else [content]
            parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
            return [part for part in parts if part.get("text") != ""] or [{"type": "text", "text": ""}]
        case list() | tuple():
            return [_part(part) for part in content]
    raise ValueError(f"a message has the content {shown(content)}; it must be text, or a list of text and image parts")


def _part(part: object) -> dict[str, Any]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image" | "image_url", **rest}:
            return {"type": "image", **{str(key): value for key, value in rest.items()}}
    raise ValueError(
        f'a message has the content part {shown(part)}; a part is {{"type": "text", "text": ...}} or '
        '{"type": "image", "image": ...}'
    )


def _source(part: Mapping[str, Any]) -> object:
    """Return the image of a part; None if it has none of its own."""
    return next((part[key] for key in SOURCES if part.get(key) is not None), None)


def _joined(parts: Sequence[Mapping[str, Any]], rest: Iterator[bytes], folder: Path) -> str | list[dict[str, Any]]:
    """Return parts with their images read, those without one of their own from `rest`."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    read: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text":
            read.append(dict(part))
            continue
        source = _source(part)
        read.append({"type": "image", "image": next(rest) if source is None else read_image(source, folder)})
    return read


def _data(url: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data URL {shown(url[:40])} is damaged: {error}") from error


def _plain(content: bytes, what: str) -> bytes:
    """Return the content of an image file that every reader turns into the same pixels: the same content, or a PNG."""
    with needs_extra("images"):
        from PIL import Image, ImageOps
    try:
        with Image.open(BytesIO(content)) as image:
            image.load()
            still, turned = getattr(image, "n_frames", 1) == 1, image.getexif().get(ORIENTATION, 1) != 1
            if image.format in FORMATS and image.mode in ("RGB", "L") and still and not turned:
                return content
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{what} is no image that Pillow can read: {error}") from error
    file, white = BytesIO(), Image.new("RGBA", upright.size, "white")
    Image.alpha_composite(white, upright).convert("RGB").save(file, "PNG")
    return file.getvalue()
