"""Tasks with images: what a dry run says of them, and what a run records."""

import base64
import json
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from millrace.cli import app
from millrace.config import load_config
from millrace.errors import MillraceError
from millrace.rollout.chat import load_prompt_format
from millrace.rollout.sample import Episode, EpisodeEnd, Problem, Sample, SampleStatus
from millrace.rollout.vision import Vision
from millrace.train.record import RunFolder
from millrace.train.sample_files import read_samples
from millrace.train.samples import SampleFormat
from tests.vision import make_image, make_tiny_vision_model, png


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "model"
    make_tiny_vision_model(folder)
    return folder


def write_config(folder: Path, model: object, *, image: str = "red.png", engine: str = "sglang") -> Path:
    (folder / "red.png").write_bytes(png(make_image()))
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "Colour?", "image": image, "answer": "red"}) + "\n")
    (folder / "reward.py").write_text("def right(answer, row):\n    return float(answer == row['answer'])\n")
    data = {"kind": "file", "path": "rows.jsonl"}
    settings = {
        "name": "images",
        "output_dir": str(folder / "runs"),
        "model": model,
        "engine": {"kind": engine},
        "data": data,
        "reward": "reward.py:right",
        "rollout": {
            "groups_per_step": 1, "samples_per_group": 2, "max_turn_tokens": 8, "max_sample_tokens": 64, "tools": [],
        },
        "train": {"steps": 1, "lr": 1e-3},
        "evaluation": {"data": data},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def pretrained(folder: Path) -> dict[str, str]:
    return {"kind": "pretrained", "path": str(folder)}


def test_the_dry_run_counts_images_and_their_placeholders(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(write_config(tmp_path, pretrained(model))), "--dry-run"])
    assert result.exit_code == 0, result.output
    chat = load_prompt_format(str(model))
    length = len(chat.prompt_of([{"role": "user", "content": [{"type": "image", "image": b""}]}]))
    length += len(chat.prompt("Colour?")) - len(chat.prompt("")) + 3  # 4 placeholders of 56x56 pixels
    says = f"# data: 1 problems with 1 images; the longest prompt, rows-1, has {length} of the 64 tokens of a sample"
    assert says in result.output


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("missing", "rows.jsonl, line 1: the image .*blue.png can't be read: No such file or directory"),
        ("bad", "rows.jsonl, line 1: the image .*rows.jsonl is no image that Pillow can read"),
        ("text model", "the prompt of problem rows-1: the model reads no images: it is a text model"),
        (
            "embedded",
            "problem rows-1 has images, which the embedded engine does not take; set engine.kind to sglang or",
        ),
    ],
)
def test_the_dry_run_says_in_one_line_what_can_not_work(
    model: Path, tiny_model: Path, tmp_path: Path, case: str, reason: str
) -> None:
    config = write_config(
        tmp_path,
        pretrained(tiny_model if case == "text model" else model),
        image={"missing": "blue.png", "bad": "rows.jsonl"}.get(case, "red.png"),
        engine="embedded" if case == "embedded" else "sglang",
    )
    result = CliRunner().invoke(app, ["train", str(config), "--dry-run"])
    assert isinstance(result.exception, MillraceError)  # of which the command prints the message
    assert re.search(reason, str(result.exception))
    assert "\n" not in str(result.exception)


def test_records_have_the_hashes_of_images_and_not_the_images(model: Path, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, pretrained(model)))
    chat = load_prompt_format(str(model))
    vision, image = chat.vision, png(make_image())
    assert isinstance(vision, Vision)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Colour?"}]
    problem = Problem("rows-1", ({"role": "user", "content": content},), {"image": image})
    ids = vision.expanded(chat.prompt_of(problem.messages), [image]) + chat.turn("red")
    mask = np.arange(len(ids)) >= len(ids) - len(chat.turn("red"))
    episode = Episode(ids, mask, np.zeros(len(ids), np.float32), (), 1, EpisodeEnd.ANSWERED, images=(image,))
    folder = RunFolder(config, resume=False)
    with folder.create():
        sample = Sample("s", "g", problem, SampleStatus.FINISHED, episode, 1.0)
        folder.add_samples(1, [sample], {}, SampleFormat(chat))
    [record] = read_samples(folder.path)
    assert record["images"] == [sha256(image).hexdigest()]
    assert record["messages"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]}]
    [sequence] = record["sequences"]
    assert sequence["token_ids"] == list(ids)
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    text = sequence["text"]
    assert text == f"<|im_start|>user\n{place}Colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"
    pieces = [text[start:end] for start, end in zip([0, *sequence["ends"]], sequence["ends"], strict=False)]
    first = ids.index(vision.placeholder)
    assert pieces[first : first + 4] == ["<|image_pad|>", "", "", ""]
    assert "".join(chat.decode([token]) for token in ids if token != vision.placeholder) == "".join(
        piece for piece, token in zip(pieces, ids, strict=True) if token != vision.placeholder
    )
    [file] = (folder.path / "samples").iterdir()
    assert base64.b64encode(image)[:40] not in file.read_bytes()
