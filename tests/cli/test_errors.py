"""Runs as a user starts them. Each failure ends in one clear message and an exit status, and leaves nothing running."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from millrace import __version__
from millrace.cli import app, main
from millrace.config import load_config
from millrace.train.sample_files import read_samples

CONFIG = """\
name: run
model: {{kind: pretrained, path: {model}}}
engine: {{kind: embedded, replicas: 1, threads: 1}}
data: {{kind: generated, seed: 1, problems: 64}}
rollout: {{groups_per_step: 2, samples_per_group: 2, max_turns: 2, max_turn_tokens: 16, max_sample_tokens: 160}}
warmup: {{steps: 2, batch_size: 2, lr: 1e-3}}
train: {{steps: 2, lr: 1e-3}}
evaluation: {{data: {{kind: generated, seed: 3, problems: 4}}, every: 1000}}
checkpoint: {{every: 1}}
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """A run of two steps that ended well: its folder, and its output."""

    folder: Path
    out: str
    err: str


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """Makes a folder with a run's settings."""
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=tiny_model))
    return tmp_path


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Ended:
    folder = tmp_path_factory.mktemp("ended")
    (folder / "run.yaml").write_text(CONFIG.format(model=tiny_model))
    status, out, err = finish(start(folder), folder)
    assert status == 0, err
    return Ended(folder, out, err)


@pytest.fixture
def copied(ended: Ended, tmp_path: Path) -> Path:
    """A copy of the folder of a run that can be resumed after its second step."""
    shutil.copytree(ended.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


@dataclass(frozen=True, slots=True)
class Here:
    """Runs `millrace train run.yaml ...` in this process, which has imported torch already. It is for errors at the
    start that need no process of their own."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def fails(self, folder: Path, *arguments: str) -> str:
        """Runs the command, which must fail, and returns its message."""
        self.monkeypatch.chdir(folder)
        self.monkeypatch.setattr(sys, "argv", ["millrace", "train", "run.yaml", f"output_dir={folder}", *arguments])
        with pytest.raises(SystemExit) as raised:
            main()
        assert raised.value.code == 1
        return self.capsys.readouterr().err


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Here(monkeypatch, capsys)


def start(folder: Path, *arguments: str, file_bytes: int | None = None) -> subprocess.Popen[str]:
    """Starts `millrace train run.yaml ...` in the folder. `file_bytes` limits the size of each file that it may
    write."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and so their children, ignore it
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.Popen(
        [sys.executable, "-m", "millrace", "train", "run.yaml", f"output_dir={folder}", *arguments],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=prepare,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], folder: Path) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()  # does nothing if it has ended
    assert not leftovers(folder)
    return process.returncode, out, err


def leftovers(folder: Path) -> list[str]:
    """The command lines of living processes that mention the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(folder) in command and path.parent.name != str(os.getpid()):
            found.append(command)
    return found


def engines(folder: Path) -> list[int]:
    """The process ids of the run's servers, without their guards."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            parts = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"millrace.engines.embedded" in parts and not any(p.endswith(b"guard.py") for p in parts):
            environment = (path.parent / "cwd").resolve()
            if environment == folder:
                found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], object], deadline: float = 180) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / "metrics.jsonl"
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in records(folder)]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}


def test_a_run_leaves_its_folder(ended: Ended, here: Here) -> None:
    assert steps(ended.folder) == [0, 1, 2]
    assert "first and last" in ended.out
    assert "weights go by shm: trainer and engines are on this host" in ended.err
    run = ended.folder / "run"
    left = {"config.yaml", "metrics.jsonl", "events.jsonl", "samples", "curves.png", "checkpoints", "logs"}
    assert left <= set(os.listdir(run))
    assert load_config(run / "config.yaml").train.steps == 2
    metrics = records(ended.folder)
    assert [m["weight_version"] for m in metrics] == [1, 2, 3]
    wanted = "step reward accuracy weight_version staleness rollout_seconds publish_seconds train_seconds tokens kl"
    assert {*wanted.split(), "clip_fraction", "logprob_gap"} <= metrics[-1].keys()
    assert sorted(os.listdir(run / "samples")) == ["step-000001.parquet", "step-000002.parquet"]
    samples = list(read_samples(run))
    assert len(samples) == 2 * 2 * 2
    assert all(s["status"] == "finished" and "<|im_start|>assistant" in s["sequences"][-1]["text"] for s in samples)
    assert all(m["logprob_gap"] < 1e-4 for m in metrics[1:])
    assert all(m["staleness"] == 0 for m in metrics[1:])
    assert "holds a run already; give --resume" in here.fails(ended.folder)


def test_standalone_mode_needs_one_setting_and_keeps_its_staleness_bound(folder: Path) -> None:
    status, _, err = finish(start(folder, "mode=standalone", "train.steps=4", "rollout.max_staleness=1"), folder)
    assert status == 0, err
    metrics = records(folder)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert all(0 <= m["staleness"] <= 1 for m in metrics[1:])
    assert max(m["staleness"] for m in metrics[1:]) > 0  # it did generate while it trained


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("rollout.group=3",), "unknown setting rollout.group; did you mean"),
        (("evaluation=null",), "evaluation: it must be a section with settings of its own (it is None)"),
        (("model.path=nowhere",), "nowhere is no model's folder"),
        (
            ("engine={kind: sglang, urls: [127.0.0.1:9]}",),
            "urls: [127.0.0.1:9]}': engine.urls: '127.0.0.1:9' is not a server's URL; write http://127.0.0.1:9",
        ),
        (
            ("engine={kind: sglang, engine_args: {tp: 2}}",),
            "tp: 2}}': engine.engine_args.tp contradicts engine.tp_size; set only engine.tp_size",
        ),
    ],
    ids=["config", "section", "model", "engine's URL", "engine's argument"],
)
def test_wrong_settings_are_reported_before_an_engine_starts(folder: Path, arguments: Sequence[str], says: str) -> None:
    status, _, err = finish(start(folder, *arguments), folder)
    assert status == 1
    assert says in err
    assert "Traceback" not in err
    assert not (folder / "run" / "logs").exists()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        (
            "data={kind: file, path: none.jsonl}",
            "none.jsonl can't be read: No such file or directory; it was looked",
        ),
        (
            "model.path=no-such-owner/model",
            "no-such-owner/model is not a local folder, and can't be downloaded from the Hub",
        ),
        ("rollout.tools=[abacus]", "no tool is called 'abacus'"),
        ("rollout.chat_template_kwargs={loud: true}", "no variable loud (rollout.chat_template_kwargs)"),
        ("--resume", "holds no run to resume"),
    ],
    ids=["data", "hub", "tool", "template", "resume"],
)
def test_settings_that_a_closer_look_rejects_are_reported_before_an_engine_starts(
    folder: Path, here: Here, argument: str, says: str
) -> None:
    err = here.fails(folder, argument)
    assert err.startswith("error: ")
    assert says in err
    assert not (folder / "run" / "logs").exists()


def test_the_version_is_printed_by_a_command_and_by_an_option() -> None:
    for words in (["version"], ["--version"]):
        result = CliRunner().invoke(app, words)
        assert (result.exit_code, result.output) == (0, f"{__version__}\n")


def test_dry_run_prints_the_resolved_settings(folder: Path) -> None:
    status, out, _ = finish(start(folder, "--dry-run", "train.lr=5e-5"), folder)
    assert status == 0
    (folder / "resolved.yaml").write_text(out)
    assert load_config(folder / "resolved.yaml").train.lr == 5e-5
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("engine.ports=[{port}]", "error: port {port} of 127.0.0.1 can't be used"),
        ("metrics.port={port}", "error: metrics can't be served at 127.0.0.1:{port} (Address already in use"),
    ],
)
def test_a_port_in_use_is_one_message(folder: Path, here: Here, setting: str, says: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        err = here.fails(folder, setting.format(port=port))
    assert says.format(port=port) in err
    assert not leftovers(folder)


def test_an_engine_that_dies_at_start_is_quoted(folder: Path, here: Here) -> None:
    err = here.fails(folder, "engine.device=cuda:7")
    assert "error: embedded-" in err
    assert "last lines of" in err
    assert not leftovers(folder)


def test_a_prompt_without_room_to_answer_is_reported_before_the_first_step(folder: Path, here: Here) -> None:
    lines = [{"question": "word " * 200, "answer": "#### 1"}, {"question": "How many?", "answer": "#### 1"}]
    (folder / "long.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    err = here.fails(folder, "data={kind: file, path: long.jsonl}")
    assert "the prompt of problem long-1 has" in err
    assert "leaves no room for an answer" in err
    dry = here.fails(folder, "data={kind: file, path: long.jsonl}", "rollout.max_sample_tokens=9999", "--dry-run")
    assert re.search(r"no room for an answer: (model.context_length|the model's max_position_embeddings) is \d+", dry)
    assert not steps(folder)
    assert not leftovers(folder)


def test_a_full_disk_at_a_checkpoint_leaves_the_last_one_whole(ended: Ended, copied: Path) -> None:
    status, out, err = finish(start(copied, "train.steps=3", "--resume", file_bytes=600_000), copied)
    assert status == 1
    assert "resumed after step 2" in out
    assert "changed setting train.steps: 2 -> 3" in out
    assert "File too large. Nothing of it was kept" in err
    assert "Traceback" not in err
    assert checkpoints(copied) == checkpoints(ended.folder)
    last = Path("run", "checkpoints", "step-00000002")
    assert contents(copied / last) == contents(ended.folder / last)


def test_a_run_survives_a_dead_engine_ends_on_ctrl_c_and_after_a_resume_ends_with_its_last_engine(
    copied: Path, here: Here
) -> None:
    process = start(copied, "train.steps=1000", "engine.replicas=2", "--resume")
    wait_until(lambda: len(steps(copied)) > 4)
    os.kill(engines(copied)[0], signal.SIGKILL)
    before = len(steps(copied))
    wait_until(lambda: len(steps(copied)) > before + 3)
    assert "is in use by another run" in here.fails(copied, "train.steps=1000", "--resume")
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process, copied)
    assert status == 130
    assert "resumed after step 2" in out
    assert "interrupted: the run's processes have been ended; --resume continues from " in err
    assert "Traceback" not in err

    last = int(checkpoints(copied)[-1].removeprefix("step-"))
    assert last > before
    process = start(copied, "train.steps=1000", "--resume", "restarts=0")
    wait_until(lambda: steps(copied)[-1] > last + 2)
    for pid in engines(copied):
        os.kill(pid, signal.SIGKILL)
    status, out, err = finish(process, copied)
    assert status == 1
    assert f"resumed after step {last}" in out
    assert "error: " in err
    assert "no engine is left" in err
    assert "SIGKILL" in err
    assert "Traceback" not in err
    count = len(steps(copied))
    assert steps(copied) == list(range(count))
    assert [record["weight_version"] for record in records(copied)] == list(range(1, count + 1))


def test_after_sigkill_of_the_trainer_nothing_is_left(folder: Path) -> None:
    process = start(folder, "train.steps=1000", "engine.replicas=2")
    wait_until(lambda: len(steps(folder)) > 1)
    before = set(os.listdir("/dev/shm"))
    assert len(engines(folder)) == 2
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: not leftovers(folder), deadline=15)
    assert set(os.listdir("/dev/shm")) <= before


def test_a_run_whose_files_are_all_torn_goes_on_and_says_what_it_dropped(copied: Path) -> None:
    run = copied / "run"
    for name in ("metrics.jsonl", "advice.jsonl", "events.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'{"step": 3, "weig' + bytes(512))
    settings = (run / "config.yaml").read_bytes()
    (run / "config.yaml").write_bytes(settings[: len(settings) // 2] + bytes(99))
    newest = run / "checkpoints" / checkpoints(copied)[-1]
    (newest / "state.json").write_bytes((newest / "state.json").read_bytes()[:20])
    status, _, err = finish(start(copied, "train.steps=3", "--resume"), copied)
    assert status == 0, err
    assert steps(copied) == [0, 1, 2, 3]
    assert {sample["step"] for sample in read_samples(run)} == {1, 2, 3}
    for name in ("metrics.jsonl", "advice.jsonl", "events.jsonl"):
        assert f"{name}: the end of the file was torn; dropped 529 bytes" in err
        assert all(orjson.loads(line) for line in (run / name).read_bytes().splitlines())
    assert "step-00000002 can't be read" in err
    assert "resuming from" in err
