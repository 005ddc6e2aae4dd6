"""Servers as processes: how they fail to start, and that they leave nothing running, however their launcher ends."""

import asyncio
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.errors import LaunchError
from millrace.launch.process import ServerProcess

# A server with a child and a grandchild that ignore SIGTERM and left its session. It writes their ids to a file.
STUBBORN_TREE = textwrap.dedent("""
    import os, signal, subprocess, sys, time
    depth, path = int(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if depth:
        subprocess.Popen([sys.executable, __file__, str(depth - 1), path], start_new_session=True)
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(600)
""")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: object, deadline: float = 15) -> None:
    end = time.monotonic() + deadline
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def read_pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def tree(tmp_path: Path) -> tuple[list[str], Path]:
    script, pids = tmp_path / "tree.py", tmp_path / "pids"
    script.write_text(STUBBORN_TREE)
    return [sys.executable, str(script), "2", str(pids)], pids


async def test_a_server_is_no_rank_of_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With torchrun's variables, an SGLang of several ranks would wait for a store that only torchrun has."""
    for name in ("RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKING", "kept")
    shown = (
        "import os; print(sorted(name for name in os.environ if 'RANK' in name or 'TORCHEL' in name or 'PORT' in name))"
    )
    process = await ServerProcess.start("server", [sys.executable, "-c", shown], tmp_path / "log", env={"MY_PORT": "1"})
    await process.wait()
    assert (tmp_path / "log").read_text() == "['MY_PORT', 'RANKING']\n"


async def test_ending_a_server_ends_its_whole_tree(tree: tuple[list[str], Path], tmp_path: Path) -> None:
    command, pids = tree
    process = await ServerProcess.start("tree", command, tmp_path / "log")
    await asyncio.to_thread(wait_until, lambda: len(read_pids(pids)) == 3)
    assert all(alive(pid) for pid in read_pids(pids))
    await process.end()
    assert not process.running
    assert not any(alive(pid) for pid in read_pids(pids))


@pytest.mark.parametrize("victim", ["launcher", "server"])
def test_the_tree_ends_when_the_launcher_or_the_server_is_killed(
    tree: tuple[list[str], Path], tmp_path: Path, victim: str
) -> None:
    command, pids = tree
    launcher = textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from millrace.launch.process import ServerProcess

        async def main():
            await ServerProcess.start("tree", {command!r}, Path({str(tmp_path / "log")!r}))
            await asyncio.sleep(600)

        asyncio.run(main())
    """)
    parent = subprocess.Popen([sys.executable, "-c", launcher])
    try:
        wait_until(lambda: len(read_pids(pids)) == 3)
        os.kill(parent.pid if victim == "launcher" else read_pids(pids)[0], signal.SIGKILL)
        wait_until(lambda: not any(alive(pid) for pid in read_pids(pids)))
    finally:
        parent.kill()
        parent.wait()


async def test_a_server_that_dies_at_start_is_reported_with_its_own_words(tmp_path: Path) -> None:
    code = "import sys; print('the model is not there', file=sys.stderr); sys.exit(3)"
    process = await ServerProcess.start("mute", [sys.executable, "-c", code], tmp_path / "log")

    async def never() -> bool:
        return False

    with pytest.raises(LaunchError, match=r"(?s)mute ended with status 3.*the model is not there"):
        await process.until_healthy(never, deadline=20)
    await process.end()


async def test_only_the_lines_of_this_start_are_quoted(tmp_path: Path) -> None:
    for said, quoted in (("an old fault", "an old fault"), ("a new fault", "a new fault"), ("", "it wrote nothing to")):
        command = [sys.executable, "-c", f"print({said!r}, end='')"]
        process = await ServerProcess.start("restarted", command, tmp_path / "log")
        await process.wait()
        assert quoted in process.log_tail()
    assert "fault" not in process.log_tail()
    assert (tmp_path / "log").read_text() == "an old faulta new fault"


async def test_a_server_that_never_gets_healthy_is_reported_at_the_deadline(tmp_path: Path) -> None:
    code = "import time; print('still loading', flush=True); time.sleep(600)"
    process = await ServerProcess.start("slow", [sys.executable, "-c", code], tmp_path / "log")

    async def never() -> bool:
        return False

    with pytest.raises(LaunchError, match="(?s)slow was not healthy within 1 s"):
        await process.until_healthy(never, deadline=1)
    await process.end()
    assert not process.running


async def test_a_killed_server_is_described_by_its_signal(tmp_path: Path) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    process = await ServerProcess.start("victim", [sys.executable, "-c", code], tmp_path / "log")
    await process.wait()
    assert process.describe_end() == "victim was killed by SIGKILL"


ORPHAN = textwrap.dedent("""
    import os, signal, subprocess, sys, time
    if sys.argv[1:]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        while os.getppid() == int(sys.argv[1]):
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGQUIT)
        time.sleep(600)
    child = subprocess.Popen([sys.executable, __file__, str(os.getpid())], stdout=subprocess.PIPE)
    child.stdout.readline()
    sys.exit(4)
""")


async def test_an_orphan_that_reports_its_failure_by_sigquit_does_not_end_the_guard(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    await asyncio.to_thread(script.write_text, ORPHAN)
    process = await ServerProcess.start("parent", [sys.executable, str(script)], tmp_path / "log")
    await process.wait()
    assert process.describe_end() == "parent ended with status 4"


async def test_a_program_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    process = await ServerProcess.start("ghost", ["/no/such/program"], tmp_path / "log")
    await process.wait()
    assert "could not be started" in process.log_tail()


LITTERING = textwrap.dedent("""
    import mmap, os, sys, tempfile, time
    path = sys.argv[1]
    shared = open("/dev/shm/" + sys.argv[2], "wb+")
    shared.truncate(4096)
    mapped = mmap.mmap(shared.fileno(), 4096)
    scratch = tempfile.NamedTemporaryFile(delete=False).name
    with open(path, "w") as file:
        file.write(scratch)
    time.sleep(600)
""")


@pytest.fixture
def shared_by_others() -> Iterator[Path]:
    """A file of shared memory that this process has mapped."""
    path = Path(f"/dev/shm/millrace_test_{os.getpid()}_others")
    with path.open("wb+") as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096):
            yield path
    path.unlink()


def test_files_that_a_killed_server_left_are_removed_unless_others_use_them(
    tmp_path: Path, shared_by_others: Path
) -> None:
    script, note = tmp_path / "littering.py", tmp_path / "scratch"
    script.write_text(LITTERING)
    own = Path(f"/dev/shm/millrace_test_{os.getpid()}_own")
    command = [sys.executable, str(script), str(note), own.name]

    def littered() -> bool:
        return note.exists() and note.read_text() != "" and time.time() - own.stat().st_ctime > 1.1

    async def start_and_end() -> None:
        process = await ServerProcess.start(
            "litter", command, tmp_path / "log", leftovers=[f"millrace_test_{os.getpid()}_*"]
        )
        try:
            await asyncio.to_thread(wait_until, littered)
            assert await asyncio.to_thread(Path(note.read_text()).exists)
        finally:
            await process.end()

    asyncio.run(start_and_end())
    scratch = Path(note.read_text())
    assert not own.exists()
    assert not scratch.parent.exists()
    assert shared_by_others.exists()
