"""Images of data and environments: which forms are read, what they become in a prompt, and which errors they have."""

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from millrace.config.sources import FileDataConfig, HubDataConfig
from millrace.config.tasks import EnvironmentConfig
from millrace.errors import DataError, UserCodeError
from millrace.placeholders import collapsed
from millrace.rollout import Problem
from millrace.rollout.agent import EpisodeLimits, converse
from millrace.rollout.calls import Calls
from millrace.rollout.chat import ChatFormat, load_dialogue_format
from millrace.rollout.data import load_problems
from millrace.rollout.environment import load_environment
from millrace.rollout.images import read_image
from millrace.rollout.sample import EpisodeEnd, images_in
from millrace.rollout.vision import Vision
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams, VersionSpan
from tests.vision import make_image, make_tiny_vision_model, png

RED, WIDE = make_image(1), make_image(2, width=112)
URL = f"data:image/png;base64,{base64.b64encode(png(RED)).decode()}"
LIMITS = EpisodeLimits(max_turns=4, max_turn_tokens=16, max_sample_tokens=400, context_length=512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "model"
    make_tiny_vision_model(folder)
    return folder


@pytest.fixture(scope="module")
def chat(model: Path) -> ChatFormat:
    return load_dialogue_format(str(model))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(png(RED))
    (tmp_path / "wide.png").write_bytes(png(WIDE))
    return tmp_path


def load(folder: Path, *rows: Mapping[str, object], **settings: str) -> tuple[Problem, ...]:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return load_problems(FileDataConfig(kind="file", path=path, **settings))


def user(*parts: object) -> list[object]:
    return [{"role": "user", "content": list(parts)}]


TEXT, PLACE = {"type": "text", "text": "Which?"}, {"type": "image"}
FORMS: dict[str, Mapping[str, object]] = {
    "column before a text": {"prompt": "Which?", "images": ["red.png", "wide.png"]},
    "places in messages, as in TRL": {"prompt": user(PLACE, PLACE, TEXT), "images": ["red.png", "wide.png"]},
    "no places, as in TRL": {"prompt": user(TEXT), "images": ["red.png", "wide.png"]},
    "marks in a text, as in verl": {"prompt": "<image><image>Which?", "images": ["red.png", "wide.png"]},
    "in the parts": {"prompt": user({**PLACE, "image": "red.png"}, {**PLACE, "path": "wide.png"}, TEXT)},
    "as OpenAI writes them": {
        "prompt": user({"type": "image_url", "image_url": {"url": URL}}, {**PLACE, "url": "wide.png"}, TEXT)
    },
    "both": {"prompt": user({**PLACE, "image": URL}, PLACE, TEXT), "image": "wide.png"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_prompt(folder: Path, chat: ChatFormat, form: str) -> None:
    [problem] = load(folder, {**FORMS[form], "answer": "red"})
    assert images_in(problem.messages) == (png(RED), png(WIDE))
    assert problem.question == "Which?"
    ids = chat.prompt_of(problem.messages)
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    assert chat.decode(ids) == f"<|im_start|>user\n{place * 2}Which?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.added(images_in(problem.messages)) == 3 + 7  # 2x2 and 4x2 placeholders


def test_rows_without_images_stay_as_they_were(folder: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "See <image>.", "images": []},
        {"prompt": "See <image>.", "images": None},
    ]
    problems = load(folder, *rows, {"prompt": user(TEXT, TEXT), "images": []})
    assert [problem.messages[0]["content"] for problem in problems] == ["See <image>."] * 2 + ["Which?Which?"]


def test_an_image_token_in_a_text_stays_text(chat: ChatFormat) -> None:
    vision = chat.vision
    assert isinstance(vision, Vision)
    ids = chat.prompt_of([{"role": "user", "content": "<|image_pad|> <|vision_start|>"}])
    assert vision.placeholder not in ids


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        ({"prompt": "?", "images": ["blue.png"]}, {}, "the image .*blue.png can't be read: No such file"),
        ({"prompt": "?", "images": ["rows.jsonl"]}, {}, "the image .*rows.jsonl is no image that Pillow can read"),
        ({"prompt": "?", "images": ["http://a/b.png"]}, {}, "http://a/b.png is on the web; download it"),
        ({"prompt": "?", "images": ["data:image/png;base64,?"]}, {}, "the data URL .* is damaged"),
        ({"prompt": "?", "images": [5]}, {}, "an image is 5; it must be a path"),
        ({"prompt": "<image>?", "images": ["red.png"] * 2}, {}, "places for 1 images, and the row has 2"),
        ({"prompt": user(PLACE, TEXT)}, {}, "places for 1 images, and the row has 0"),
        ({"prompt": "?"}, {"images": "photo"}, 'no column "photo"; it has: prompt'),
    ],
)
def test_a_row_that_can_not_be_used(folder: Path, row: Any, settings: dict[str, str], reason: str) -> None:
    with pytest.raises(DataError, match=reason) as raised:
        load(folder, row, **settings)
    assert str(raised.value).startswith(f"{folder / 'rows.jsonl'}, line 1: ")
    assert "\n" not in str(raised.value)


def test_images_in_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "set").mkdir()
    columns = {"question": ["Which?"], "image": [RED], "images": [[WIDE, RED]]}
    features = {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
    made = datasets.Dataset.from_dict(
        columns, features=datasets.Features({"question": datasets.Value("string"), **features})
    )
    made.to_parquet(folder / "set" / "train.parquet")
    of_file = {"kind": "file", "path": folder / "set" / "train.parquet"}
    for settings, expected in (({}, [WIDE, RED]), ({"images": "image"}, [RED])):
        [problem] = load_problems(FileDataConfig.model_validate({**of_file, **settings}))
        [same] = load_problems(HubDataConfig(kind="hub", path=str(folder / "set"), split="train", **settings))
        for found in (problem, same):
            pixels = [np.asarray(Image.open(BytesIO(image))) for image in images_in(found.messages)]
            assert [image.tolist() for image in pixels] == [np.asarray(image).tolist() for image in expected]


def test_what_readers_would_treat_differently_is_made_plain(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    with Image.open(BytesIO(read_image(clear, tmp_path))) as white:
        assert (white.mode, white.getpixel((0, 0)), white.getpixel((1, 1))) == ("RGB", (0, 0, 255), (255, 255, 255))
    blue = Image.new("RGB", (4, 2), "blue")
    blue.save(tmp_path / "blue.tiff")
    blue.save(tmp_path / "film.webp", save_all=True, append_images=[clear], lossless=True)
    for name in ("blue.tiff", "film.webp"):
        with Image.open(BytesIO(read_image(name, tmp_path))) as plain:
            assert (plain.format, plain.getpixel((1, 1))) == ("PNG", (0, 0, 255))
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(BytesIO(read_image("turned.jpg", tmp_path))) as upright:
        assert upright.size == (2, 4)


def test_a_text_model_reads_no_images(tiny_model: Path, folder: Path) -> None:
    [problem] = load(folder, {"prompt": "?", "images": ["red.png"]})
    with pytest.raises(DataError, match="the model reads no images: it is a text model"):
        load_dialogue_format(str(tiny_model)).prompt_of(problem.messages)


class Seer:
    """Reads images as an engine does: a run of placeholders takes the place of each one. It says what it was told."""

    def __init__(self, chat: ChatFormat, *turns: str) -> None:
        assert isinstance(chat.vision, Vision)
        self.chat, self.vision, self.turns = chat, chat.vision, list(turns)
        self.requests: list[GenerateRequest] = []

    async def __call__(self, request: GenerateRequest) -> Generation:
        self.requests.append(request)
        read = self.vision.expanded(collapsed(request.input_ids, self.vision.placeholder), request.images)
        ids = self.chat.turn(self.turns.pop(0))
        spans = (VersionSpan(1, 0, len(ids)),)
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
        return Generation(request.request_id, ids, logprobs, FinishReason.STOP, spans, len(read), 0, prompt_ids=read)


SHOW = """
from PIL import Image
from millrace.rollout import Step

class Show:
    def reset(self, row):
        return [{"role": "user", "content": [{"type": "image", "image": Image.open(row["path"])}]}]

    def step(self, action):
        if action.text == "pens":
            return Step(reward=1.0, done=True)
        image = Image.new("RGB", (56, 84), "red") if action.text == "cards" else 7
        text = {"type": "text", "text": "Look again."}
        return Step([{"role": "user", "content": [text, {"type": "image", "image": image}]}])
"""


async def show(folder: Path, chat: ChatFormat, seer: Seer, limits: EpisodeLimits = LIMITS) -> Any:
    (folder / "env.py").write_text(SHOW)
    kind = load_environment(EnvironmentConfig(path=str(folder / "env.py"), name="Show"), Calls())
    async with kind.episode(Problem("p-1", (), {"path": str(folder / "wide.png")})) as played:
        prompt = await played.reset()
        return await converse(
            "s",
            chat.prompt_of(prompt),
            played.respond,
            generate=seer,
            chat=chat,
            calls_tools=False,
            takes_cut_turns=True,
            limits=limits,
            sampling=SamplingParams(16),
            images=images_in(prompt),
        )


async def test_turns_keep_the_images_and_what_the_engine_read(folder: Path, chat: ChatFormat) -> None:
    seer = Seer(chat, "cards", "pens")
    episode = await show(folder, chat, seer)
    first, second = seer.requests
    assert (len(first.images), second.images, episode.images) == (1, episode.images, episode.images)
    place = "<|vision_start|>" + "<|image_pad|>" * 8 + "<|vision_end|>"
    again = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    assert chat.decode(episode.token_ids) == (
        f"<|im_start|>user\n{place}<|im_end|>\n<|im_start|>assistant\ncards<|im_end|>\n"
        f"<|im_start|>user\nLook again.{again}<|im_end|>\n<|im_start|>assistant\npens<|im_end|>"
    )
    assert "<|image_pad|>" * 2 not in chat.decode(chat.folded(episode.token_ids))
    assert chat.decode(np.asarray(episode.token_ids)[episode.loss_mask].tolist()) == "cards<|im_end|>pens<|im_end|>"
    turns = [-np.arange(1, len(chat.turn(text)) + 1, dtype=np.float32) for text in ("cards", "pens")]
    assert episode.logprobs[episode.loss_mask].tolist() == np.concatenate(turns).tolist()
    assert second.input_ids[:10] == episode.token_ids[:10]  # the run is not folded again
    seer.vision.require_runs(episode.token_ids, episode.images)
    assert [part["type"] for part in episode.messages[1]["content"]] == ["text", "image"]


async def test_the_limits_count_the_placeholders_to_come(folder: Path, chat: ChatFormat) -> None:
    whole = await show(folder, chat, Seer(chat, "cards", "pens"))
    before = len(whole.token_ids) - len(chat.turn("pens"))
    limits = EpisodeLimits(max_turns=4, max_turn_tokens=16, max_sample_tokens=before + 1, context_length=512)
    seer = Seer(chat, "cards", "pens")
    await show(folder, chat, seer, limits)
    assert seer.requests[1].sampling.max_new_tokens == 1
    seer = Seer(chat, "cards")
    cut = await show(folder, chat, seer, EpisodeLimits(4, 16, before, 512))
    assert (cut.end, cut.turns, len(cut.images)) == (EpisodeEnd.TOKEN_LIMIT, 1, 1)
    prompt = len(seer.requests[0].input_ids) + 7
    with pytest.raises(DataError, match=f"its prompt has {prompt} tokens and leaves no room"):
        await show(folder, chat, Seer(chat), EpisodeLimits(4, 16, prompt, 512))


async def test_a_placeholder_of_the_models_own(folder: Path, chat: ChatFormat) -> None:
    seer = Seer(chat, "cards<|image_pad|>")
    with pytest.raises(DataError, match="request s/0: the model itself generated a placeholder of images"):
        await show(folder, chat, seer)


async def test_an_observation_that_is_no_image(folder: Path, chat: ChatFormat) -> None:
    with pytest.raises(UserCodeError, match=r"returned an observation that can't be read: an image is 7; .* row p-1"):
        await show(folder, chat, Seer(chat, "coins"))


async def test_an_engine_that_reads_something_else(folder: Path, chat: ChatFormat) -> None:
    class Mute(Seer):
        async def __call__(self, request: GenerateRequest) -> Generation:
            return replace(await super().__call__(request), prompt_ids=None)

    class Forgetful(Seer):
        async def __call__(self, request: GenerateRequest) -> Generation:
            made = await super().__call__(request)
            return made if len(self.requests) == 1 else replace(made, prompt_ids=(made.prompt_ids or ())[1:])

    with pytest.raises(DataError, match="did not say how it read the prompt"):
        await show(folder, chat, Mute(chat, "cards"))
    with pytest.raises(DataError, match="read other tokens than it did before"):
        await show(folder, chat, Forgetful(chat, "cards", "cards"))
