"""Runs as a user starts them: each way to go wrong ends in one clear message, a status, and nothing left running."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from millrace import __version__
from millrace.cli import app
from millrace.config import load_config

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


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=tiny_model))
    return tmp_path


def start(folder: Path, *arguments: str, file_bytes: int | None = None) -> subprocess.Popen[str]:
    """`millrace train run.yaml ...` in the folder; `file_bytes` limits the size of what it may write."""

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
        process.kill()  # nothing, where it has ended
    assert not leftovers(folder)
    return process.returncode, out, err


def leftovers(folder: Path) -> list[str]:
    """The command lines of living processes that have to do with the folder."""
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


def steps(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    return [orjson.loads(line)["step"] for line in path.read_bytes().splitlines()] if path.exists() else []


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_a_run_leaves_its_folder_and_resumes_from_it(folder: Path) -> None:
    status, out, err = finish(start(folder), folder)
    assert status == 0, err
    assert steps(folder) == [0, 1, 2]
    assert "first and last" in out
    assert "weights go by shm: trainer and engines are on this host" in err
    run = folder / "run"
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints", "logs"} <= set(
        os.listdir(run)
    )
    assert load_config(run / "config.yaml").train.steps == 2
    metrics = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert [m["weight_version"] for m in metrics] == [1, 2, 3]
    wanted = "step reward accuracy weight_version staleness rollout_seconds publish_seconds train_seconds tokens kl"
    assert {*wanted.split(), "clip_fraction", "logprob_gap"} <= metrics[-1].keys()
    samples = [orjson.loads(line) for line in (run / "samples.jsonl").read_bytes().splitlines()]
    assert len(samples) == 2 * 2 * 2
    assert all(s["status"] == "finished" and "<|im_start|>assistant" in s["text"] for s in samples)
    assert all(m["logprob_gap"] < 1e-4 for m in metrics[1:])
    assert all(m["staleness"] == 0 for m in metrics[1:])

    status, _, err = finish(start(folder), folder)
    assert status == 1
    assert "holds a run already; give --resume" in err

    status, out, err = finish(start(folder, "train.steps=4", "--resume"), folder)
    assert status == 0, err
    assert "resumed after step 2" in out
    assert steps(folder) == [0, 1, 2, 3, 4]
    assert [orjson.loads(x)["weight_version"] for x in (run / "metrics.jsonl").read_bytes().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_standalone_mode_runs_by_one_word_and_keeps_its_bound(folder: Path) -> None:
    status, _, err = finish(start(folder, "mode=standalone", "train.steps=4", "rollout.max_staleness=1"), folder)
    assert status == 0, err
    records = [orjson.loads(line) for line in (folder / "run" / "metrics.jsonl").read_bytes().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    assert all(0 <= r["staleness"] <= 1 for r in records[1:])
    assert max(r["staleness"] for r in records[1:]) > 0  # it did generate while it trained


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("rollout.group=3",), "unknown setting rollout.group; did you mean"),
        (("data={kind: file, path: none.jsonl}",), "none.jsonl"),
        (("model.path=nowhere",), "nowhere is no model's folder"),
        (("model.path=no-such-owner/model",), "no-such-owner/model is no folder here and can't be had from the Hub"),
        (("rollout.tools=[abacus]",), "no tool is called 'abacus'"),
        (("--resume",), "holds no run to resume"),
        (
            ("engine={kind: sglang, urls: [127.0.0.1:9]}",),
            "urls: [127.0.0.1:9]}': engine.urls: '127.0.0.1:9' is no server's URL; write http://127.0.0.1:9",
        ),
        (
            ("engine={kind: sglang, engine_args: {tp: 2}}",),
            "tp: 2}}': engine.engine_args.tp contradicts engine.tp_size; set only engine.tp_size",
        ),
    ],
    ids=["config", "data", "model", "hub", "tool", "resume", "engine's URL", "engine's argument"],
)
def test_what_is_wrong_from_the_start_is_said_before_an_engine_starts(
    folder: Path, arguments: Sequence[str], says: str
) -> None:
    status, _, err = finish(start(folder, *arguments), folder)
    assert status == 1
    assert says in err
    assert "Traceback" not in err


def test_the_version_is_told_by_word_and_by_option() -> None:
    for words in (["version"], ["--version"]):
        result = CliRunner().invoke(app, words)
        assert (result.exit_code, result.output) == (0, f"{__version__}\n")


def test_dry_run_prints_the_resolved_settings(folder: Path) -> None:
    status, out, _ = finish(start(folder, "--dry-run", "train.lr=5e-5"), folder)
    assert status == 0
    (folder / "resolved.yaml").write_text(out)
    assert load_config(folder / "resolved.yaml").train.lr == 5e-5
    assert not (folder / "run").exists()


def test_a_port_in_use_is_one_message(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = finish(start(folder, f"engine.ports=[{port}]"), folder)
    assert status == 1
    assert f"port {port} of 127.0.0.1 can't be used" in err
    assert "Traceback" not in err


def test_an_engine_that_dies_at_start_is_quoted(folder: Path) -> None:
    status, _, err = finish(start(folder, "engine.device=cuda:7"), folder)
    assert status == 1
    assert "error: embedded-" in err
    assert "last lines of" in err


def test_a_prompt_without_room_to_answer_is_told_before_the_first_step(folder: Path) -> None:
    lines = [{"question": "word " * 200, "answer": "#### 1"}, {"question": "How many?", "answer": "#### 1"}]
    (folder / "long.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    status, _, err = finish(start(folder, "data={kind: file, path: long.jsonl}"), folder)
    assert status == 1
    assert "the prompt of problem long-1 has" in err
    assert "leaves no room for an answer" in err


def test_engines_that_die_in_mid_run_end_it_with_their_reason(folder: Path) -> None:
    process = start(folder, "train.steps=1000")
    wait_until(lambda: len(steps(folder)) > 2)
    for pid in engines(folder):
        os.kill(pid, signal.SIGKILL)
    status, _, err = finish(process, folder)
    assert status == 1
    assert "error: " in err
    assert "no engine is left" in err
    assert "SIGKILL" in err
    assert "Traceback" not in err


def test_one_engine_less_is_survived(folder: Path) -> None:
    process = start(folder, "train.steps=40", "engine.replicas=2")
    wait_until(lambda: len(steps(folder)) > 2)
    os.kill(engines(folder)[0], signal.SIGKILL)
    status, _, err = finish(process, folder)
    assert status == 0, err
    assert steps(folder) == list(range(41))


def test_a_full_disk_at_a_checkpoint_leaves_the_last_one_whole(folder: Path) -> None:
    status, _, err = finish(start(folder, "train.steps=1"), folder)
    assert status == 0, err
    status, _, err = finish(start(folder, "train.steps=2", "--resume", file_bytes=600_000), folder)
    assert status == 1
    assert "File too large. Nothing of it was kept" in err
    assert "Traceback" not in err
    assert checkpoints(folder) == ["step-00000001"]
    status, _, err = finish(start(folder, "train.steps=2", "--resume"), folder)
    assert status == 0, err


def test_ctrl_c_ends_all_and_the_last_checkpoint_resumes(folder: Path) -> None:
    process = start(folder, "train.steps=1000")
    wait_until(lambda: len(steps(folder)) > 2)
    second = start(folder, "train.steps=1000", "--resume")
    _, told = second.communicate(timeout=300)
    assert second.returncode == 1
    assert "is in use by another run" in told
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process, folder)
    assert status == 130
    assert "interrupted: what was started has been ended; --resume goes on from " in err
    assert "Traceback" not in err
    [*_, last] = checkpoints(folder)
    status, out, err = finish(start(folder, "--resume", f"train.steps={int(last.removeprefix('step-')) + 1}"), folder)
    assert status == 0, err
    assert "resumed after step" in out


def test_after_sigkill_of_the_trainer_nothing_is_left(folder: Path) -> None:
    process = start(folder, "train.steps=1000", "engine.replicas=2")
    wait_until(lambda: len(steps(folder)) > 1)
    before = set(os.listdir("/dev/shm"))
    assert len(engines(folder)) == 2
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: not leftovers(folder), deadline=15)
    assert set(os.listdir("/dev/shm")) <= before
