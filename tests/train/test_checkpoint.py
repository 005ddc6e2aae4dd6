import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config.models import LossConfig
from millrace.errors import CheckpointError
from millrace.train.checkpoint import export, latest, load, load_latest, save
from tests.train.small_models import make_config, make_model, make_policy, make_samples, make_trainer, same, weights

SAMPLES = make_samples(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Limits every file of this process to `nbytes`. Writing beyond that fails with an OSError, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_going_on_from_a_checkpoint_is_the_same_as_never_having_stopped(folder: Path, tmp_path: Path) -> None:
    config = make_config(minibatches=2, loss=LossConfig(kl_coefficient=0.2))
    whole = make_trainer(folder, config)
    expected = [whole.train_step(make_samples(8, seed=step), 1.0) for step in range(4)]

    first = make_trainer(folder, config)
    for step in range(2):
        first.train_step(make_samples(8, seed=step), 1.0)
    rng = random.Random(5)
    rng.random()
    extra = {"weight_version": 2, "position": {"epoch": 0, "problem": 16}, "rng": rng.getstate()}
    saved = save(tmp_path, first, extra, keep=2)
    del first

    second = make_trainer(folder, config)
    found = latest(tmp_path)
    assert found == saved
    restored = load(saved, second)
    assert restored == json.loads(json.dumps(extra))
    assert second.step == 2
    assert [second.train_step(make_samples(8, seed=step), 1.0) for step in (2, 3)] == expected[2:]
    assert same(weights(second.policy), weights(whole.policy))


def test_a_checkpoint_before_the_first_step_is_whole_too(folder: Path, tmp_path: Path) -> None:
    first, second = make_trainer(folder, make_config()), make_trainer(folder, make_config())
    load(save(tmp_path, first, {}, keep=1), second)
    assert first.train_step(SAMPLES, 1.0) == second.train_step(SAMPLES, 1.0)
    assert same(weights(first.policy), weights(second.policy))


def test_settings_are_the_configs_not_the_checkpoints(folder: Path, tmp_path: Path) -> None:
    first = make_trainer(folder, make_config())
    first.train_step(SAMPLES, 1.0)
    changed = make_config(lr=5e-3, betas=(0.5, 0.6), eps=1e-5, weight_decay=0.0)
    second = make_trainer(folder, changed)
    load(save(tmp_path, first, {}, keep=1), second)
    group = second.optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-5, 0.0)
    assert second.train_step(SAMPLES, 1.0).lr == 5e-3


def test_the_last_checkpoints_are_kept_and_leftovers_of_a_killed_process_go(folder: Path, tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    trainer = make_trainer(folder, make_config())
    for step in (8, 9, 10, 11):
        trainer.step = step
        save(tmp_path, trainer, {}, keep=2)
    assert names(tmp_path / "checkpoints") == ["step-00000010", "step-00000011"]
    for leftover in (".step-00000012.partial", ".step-00000009.deleted"):
        (tmp_path / "checkpoints" / leftover).mkdir()
        (tmp_path / "checkpoints" / leftover / "__0_0.distcp").write_bytes(b"half")
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000011"
    trainer.step = 12
    save(tmp_path, trainer, {}, keep=1)
    assert names(tmp_path / "checkpoints") == ["step-00000012"]


def test_saving_a_step_again_replaces_it(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder, make_config())
    save(tmp_path, trainer, {"run": 1}, keep=2)
    saved = save(tmp_path, trainer, {"run": 2}, keep=2)
    assert load(saved, trainer) == {"run": 2}
    assert names(tmp_path / "checkpoints") == [saved.name]


def test_a_disk_that_takes_no_more_leaves_the_checkpoint_before_whole(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder, make_config())
    trainer.train_step(SAMPLES, 1.0)
    before = save(tmp_path, trainer, {"version": 1}, keep=1)
    kept = weights(trainer.policy)
    trainer.train_step(SAMPLES, 1.0)
    with largest_file(300_000), pytest.raises(CheckpointError, match="File too large") as failure:
        save(tmp_path, trainer, {"version": 2}, keep=1)
    assert "\n" not in str(failure.value)
    assert names(tmp_path / "checkpoints") == [before.name]
    assert load(before, trainer) == {"version": 1}
    assert same(weights(trainer.policy), kept)


def test_ctrl_c_while_saving_is_ctrl_c_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(folder, make_config())

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, trainer, {}, keep=1)
    assert names(tmp_path / "checkpoints") == []
    save(tmp_path, trainer, {}, keep=1)


FULL_DISK = """
import sys
from pathlib import Path
from tests.train.small_models import make_config, make_trainer
from millrace.errors import CheckpointError
from millrace.train.checkpoint import export, latest, load, save

model, disk = map(Path, sys.argv[1:])
trainer = make_trainer(model, make_config())
before = save(disk, trainer, {}, keep=2)
trainer.step = 1
for write in (lambda: save(disk, trainer, {}, keep=2), lambda: export(trainer.policy, disk / "model")):
    (disk / "filler").write_bytes(bytes(FILLER))
    try:
        write()
    except CheckpointError as error:
        print(error)
    (disk / "filler").unlink()
assert [path.name for path in disk.iterdir()] == ["checkpoints"], list(disk.iterdir())
assert latest(disk) == before and len(list(before.parent.iterdir())) == 1
load(before, trainer)
"""


def test_a_full_disk(folder: Path, tmp_path: Path) -> None:
    """Uses a real full disk: 2 MB of memory, mounted in a namespace that ends with the process."""
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=2m tmpfs {disk}"
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no mount; the test above limits the file's size instead")
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    script = FULL_DISK.replace("FILLER", str(2 * 2**20 - 4 * nbytes))
    result = subprocess.run(
        [*unshare, f'{mount} && exec "$@"', "sh", sys.executable, "-c", script, str(folder), str(disk)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stdout
    assert all("No space left on device" in line for line in lines), result.stdout


def test_an_unreadable_checkpoint_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder, make_config())
    with pytest.raises(CheckpointError, match=r"step-00000042 can't be read.*No such file"):
        load(tmp_path / "checkpoints" / "step-00000042", trainer)

    saved = save(tmp_path, trainer, {}, keep=5)
    other = make_trainer(make_model(tmp_path / "other", hidden_size=32), make_config())
    with pytest.raises(CheckpointError, match=r"can't be read.*[Ss]ize"):
        load(saved, other)
    with_reference = make_trainer(folder, make_config(loss=LossConfig(kl_coefficient=0.1)))
    with pytest.raises(CheckpointError, match="kl_coefficient"):
        load(saved, with_reference)

    shard = saved / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="can't be read"):
        load(saved, trainer)
    (saved / "state.json").write_text('{"format": 99, "step": 0, "extra": {}}')
    with pytest.raises(CheckpointError, match="format 99"):
        load(saved, trainer)
    (saved / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="can't be read"):
        load(saved, trainer)


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_a_model_like_any_other(tmp_path: Path, tied: bool) -> None:
    policy = make_policy(make_model(tmp_path / "model", tied=tied), make_config())
    for tensor in policy.state().values():
        tensor.mul_(1.1)
    for _ in range(2):  # the second replaces the first
        export(policy, tmp_path / "export")
    assert names(tmp_path) == ["export", "model"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    token_ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(token_ids).logits, policy.model(token_ids).logits)
    assert loaded.config.architectures == ["Qwen3ForCausalLM"]


def test_an_export_that_fails_leaves_the_one_before(folder: Path, tmp_path: Path) -> None:
    policy = make_policy(folder, make_config())
    export(policy, tmp_path / "export")
    before = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    with largest_file(100_000), pytest.raises(CheckpointError, match="File too large"):
        export(policy, tmp_path / "export")
    assert names(tmp_path) == ["export"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()} == before


def test_a_torn_checkpoint_gives_way_to_the_one_before(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(folder, make_config())
    trainer.train_step(SAMPLES, 1.0)
    before = save(tmp_path, trainer, {"version": 1}, keep=5)
    expected = weights(trainer.policy)
    trainer.train_step(SAMPLES, 1.0)
    newest = save(tmp_path, trainer, {"version": 2}, keep=5)
    aside = newest.with_name(f"{newest.name}.damaged")
    files = {path.relative_to(newest): path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    assert len(files) >= 3
    for name, content in files.items():
        middle = len(content) // 2
        torn = [content[:cut] for cut in (0, 1, middle, len(content) - 1)]
        torn += [content[:middle] + bytes(len(content) - middle), bytes(len(content))]  # a power cut leaves this
        for left in torn:
            caplog.clear()
            (newest / name).write_bytes(left)
            found, extra = load_latest(tmp_path, trainer)
            assert (found, extra) == (before, {"version": 1}), f"{name} with {len(left)} of {len(content)} bytes"
            assert same(weights(trainer.policy), expected)
            assert f"checkpoint {newest} can't be read" in caplog.text
            assert latest(tmp_path) == before
            aside.rename(newest)
            (newest / name).write_bytes(content)
    assert load_latest(tmp_path, trainer)[1] == {"version": 2}


def test_if_no_checkpoint_can_be_read_the_newest_ones_error_is_reported_and_none_is_moved(
    folder: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(folder, make_config())
    saved = []
    for _ in range(2):
        trainer.train_step(SAMPLES, 1.0)
        saved.append(save(tmp_path, trainer, {}, keep=2))
        (saved[-1] / "state.json").write_bytes(b'{"format"')
    with pytest.raises(CheckpointError, match=f"checkpoint {saved[1]} can't be read"):
        load_latest(tmp_path, trainer)
    assert all(path.is_dir() for path in saved)
