"""Draws shapes, and makes a tiny vision-language model that has learned to name colours, but mostly wrong ones."""

import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from millrace.config.models import TrainConfig
from millrace.config.sources import FileDataConfig
from millrace.rollout.chat import load_prompt_format
from millrace.rollout.data import load_problems
from millrace.rollout.sample import images_in
from millrace.train.batch import supervised_sample
from millrace.train.policy import load_policy
from millrace.train.tiny_vision import make_tiny_vision_model
from millrace.train.trainer import Trainer
from millrace.train.world import World

OUT = Path("runs/colored_shapes")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 40)}
NAMES = list(COLOURS)


def draw(data_set: str, number: int, dice: random.Random) -> None:
    """Draw the images of a data set, and write a row for each."""
    rows = []
    for index in range(number):
        colour, left, top, size = dice.choice(NAMES), dice.randint(2, 16), dice.randint(2, 16), dice.randint(24, 38)
        image = Image.new("RGB", (56, 56), "white")
        pen = ImageDraw.Draw(image)
        shape = dice.choice([pen.rectangle, pen.ellipse])
        shape((left, top, left + size, top + size), COLOURS[colour])
        image.save(OUT / f"{data_set}-{index}.png")
        rows.append({"prompt": "Colour?", "image": f"{data_set}-{index}.png", "answer": colour})
    (OUT / f"{data_set}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def warm_up(steps: int, dice: random.Random) -> None:
    """Make the model, and teach it by supervised steps to answer with a colour: in two cases of three, a wrong one."""
    folder, config = OUT / "model", TrainConfig(steps=steps, lr=3e-3, lr_warmup_steps=10)
    make_tiny_vision_model(folder, context_length=128)
    chat = load_prompt_format(str(folder))
    trainer = Trainer(load_policy(folder, config, World(torch.device("cpu"))), config)
    problems = load_problems(FileDataConfig(kind="file", path=OUT / "train.jsonl"))
    for step in range(1, steps + 1):
        samples = []
        for problem in dice.sample(problems, 16):
            word = problem.answer if dice.random() < 1 / 3 else NAMES[NAMES.index(problem.answer) - 1]
            prompt, images = chat.prompt_of(problem.messages), images_in(problem.messages)
            prompt, turn = chat.vision.expanded(prompt, images), chat.turn(word)
            samples.append(supervised_sample(prompt + turn, [False] * len(prompt) + [True] * len(turn), images))
        print(f"step {step}: loss {trainer.supervised_step(samples).loss:.3f}")
    trainer.policy.model.save_pretrained(folder)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    draw("train", 256, random.Random(0))
    draw("test", 32, random.Random(1))
    warm_up(100, random.Random(2))
