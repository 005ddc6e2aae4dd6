"""How a model reads images: its placeholder token, and the image processor of its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image
from transformers import AutoConfig

# Without torchvision, the name in `transformers` 5.10 stands for an error, although Pillow is enough.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from millrace.errors import DataError
from millrace.placeholders import runs
from millrace.rollout.chat_template import first_line


@dataclass(frozen=True, slots=True)
class Vision:
    """How one model reads images.

    placeholder: the id of the token that stands for an image; engines replace it by a run of them. processor: the
    model's image processor, which stock engines use too. Like them it resizes by torchvision if that is installed, and
    by Pillow otherwise.
    """

    placeholder: int
    processor: Any

    def tokens(self, image: bytes) -> int:
        """Return the number of placeholders that an image takes. image: the content of an image file."""
        with Image.open(BytesIO(image)) as opened:
            patches = self.processor.get_number_of_image_patches(opened.height, opened.width, {})
        return int(patches // self.processor.merge_size**2)

    def added(self, images: Sequence[bytes]) -> int:
        """Return how many tokens a prompt gains when each image's placeholder becomes a run."""
        return sum(self.tokens(image) - 1 for image in images)

    def expanded(self, token_ids: Sequence[int], images: Sequence[bytes]) -> tuple[int, ...]:
        """Return token ids with a run of placeholders in place of each one, as an engine reads them.

        Raises ValueError unless there is one placeholder for each image.
        """
        if (places := list(token_ids).count(self.placeholder)) != len(images):
            raise ValueError(f"there are {places} placeholders for {len(images)} images")
        lengths = map(self.tokens, images)
        runs = ([token] * (next(lengths) if token == self.placeholder else 1) for token in token_ids)
        return tuple(token for run in runs for token in run)

    def inputs(self, images: Sequence[bytes]) -> dict[str, Any]:
        """Return the model's inputs for images, as tensors on the CPU: `pixel_values` and `image_grid_thw`."""
        opened = [Image.open(BytesIO(image)).convert("RGB") for image in images]
        return dict(self.processor(opened, return_tensors="pt"))

    def blank(self) -> tuple[bytes, int]:
        """Return a small white image, as the content of an image file, and how many placeholders it takes."""
        file = BytesIO()
        Image.new("RGB", (28, 28), "white").save(file, "PNG")
        return file.getvalue(), self.tokens(file.getvalue())

    def require_runs(self, token_ids: Sequence[int], images: Sequence[bytes]) -> None:
        """Raise DataError unless `token_ids` has a run of placeholders of the right length for each image."""
        found = [length for _, length in runs(token_ids, self.placeholder)]
        expected = [self.tokens(image) for image in images]
        if found != expected:
            raise DataError(
                f"a sample has runs of {found} placeholders for its images, and the model's image processor makes "
                f"{expected} of them: the engine uses other settings. Start it with those of the model's "
                "preprocessor_config.json, such as min_pixels and max_pixels"
            )


def load_vision(path: str) -> Vision | str:
    """Return how the model of a folder or Hub name reads images, or the reason why it reads none."""
    try:
        placeholder = getattr(AutoConfig.from_pretrained(path), "image_token_id", None)
    except (OSError, ValueError, KeyError) as error:
        return f"transformers can't read its config ({first_line(error)})"
    if not isinstance(placeholder, int):
        return "it is a text model, whose config has no image_token_id"
    try:
        processor = AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return f"its image processor can't be loaded ({first_line(error)})"
    if not hasattr(processor, "get_number_of_image_patches") or not hasattr(processor, "merge_size"):
        return f"{type(processor).__name__} is not supported: images need a model of the form of Qwen2-VL to Qwen3.5"
    return Vision(placeholder, processor)
