"""Config files as editors and other systems leave them. Each is read, or refused in one line with the line number."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.config import dump_config, load_config
from millrace.config.reading import parse_yaml
from millrace.errors import ConfigError
from tests.config.test_loading import VALID


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", ":1: it is empty"),
        (b"# nothing\n", ":1: it is empty"),
        (b"just text", ":1: it must be a mapping"),
        (b"name: a\ndata: {\n", ":3: it is not YAML"),
        (b"name: a\n\tmodel: b\n", ":2: it is not YAML: .*indent by spaces"),
        (b"name: a\nseed: 1\nname: b\n", ":3: .*key name is set twice, first in line 1"),
        (b"name: a\ntrain:\n  lr: 1\n  lr: 2\n", ":4: .*key lr is set twice, first in line 3"),
        (b"name: a\ntrain: &t\n  lr: *t\n", ":2: .*contains itself"),
        (b"train: &t\n  <<: *t\n", ":1: .*contains itself"),
        (b"a: &a\n  <<: [*a]\n", ":1: .*contains itself"),
        (b"a: &a [*a]\n", ":1: .*contains itself"),
        (b"a: *b\n", ":1: .*undefined alias"),
        (b"name: a\n<<: 3\n", ":2: .*expected a mapping"),
        (b"? [a, b]\n: c\n", ":1: .*must be a name"),
        (b"name: a\n---\nname: b\n", ":2: .*single document"),
        (b"name: a\nseed: 2024-13-45\n", ":2: .*'2024-13-45' can't be read"),
        (b"name: !!python/object:os.system a\n", ":1: .*could not determine a constructor"),
        (b"name: a\nseed: \0\n", ":2: .*character #x0000 is not allowed"),
        ("name: a\n# für alle\n".encode("latin-1"), ":2: byte 0xfc is not UTF-8; save the file"),
        ("name: a\n".encode("utf-16"), ":1: byte 0xff is not UTF-8"),
        (b"a: " + b"[" * 5_000, "nested too deeply"),
        (b"a0: &a0 [1,1]\n" + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9))
         for n in range(1, 9)), ": the file.s aliases expand to more than 10000 values"),
    ],
)  # fmt: skip
def test_an_unclear_file_is_refused_in_one_line_with_the_line_number(raw: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("encoded", [VALID.encode("utf-8-sig"), VALID.replace("\n", "\r\n").encode()])
def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(encoded: bytes, tmp_path: Path) -> None:
    (plain := tmp_path / "plain.yaml").write_text(VALID)
    (other := tmp_path / "other.yaml").write_bytes(encoded)
    assert load_config(other) == load_config(plain)


def test_an_override_changes_one_place_and_not_what_shares_its_anchor(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        VALID.replace("engine:\n", "engine: &engine\n") + "judges:\n  model: {kind: tiny}\n  engine: *engine\n"
    )
    config = load_config(path, ["engine.replicas=5"])
    assert config.engine.replicas == 5
    assert config.judges is not None
    assert config.judges.engine.replicas == 2


def test_a_mistake_in_a_merged_mapping_names_the_line_that_it_came_from(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    judges = "judges:\n  model: {kind: tiny}\n  engine:\n    <<: *engine\n    threads: 0\n"
    path.write_text(VALID.replace("engine:\n", "engine: &engine\n").replace("replicas: 2", "replicas: x") + judges)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = [re.match(rf"{re.escape(str(path))}:(\d+): ([\w.]+)", line) for line in str(caught.value).splitlines()]
    assert {match.groups() for match in lines if match} >= {
        ("5", "judges.engine.replicas"),
        (str(len(VALID.splitlines()) + 5), "judges.engine.threads"),
    }


@given(st.text(max_size=60) | st.from_regex(r"[&*<:\[\]{}a!\t\n ,'\"-]{0,60}", fullmatch=True))
def test_any_text_is_read_or_refused_with_a_message(text: str) -> None:
    try:
        parse_yaml(text, "it")
    except ConfigError as error:
        message = str(error)
    else:
        return
    assert message.startswith("it")


PATHS = ("data.path", "output_dir", "publish.folder", "model.path", "engine.python", "router.python")
WITH_PATHS = (
    VALID.replace("{kind: tiny}", "{kind: pretrained, path: m}")
    .replace("{kind: generated, seed: 1, problems: 10}", "{kind: file, path: d}", 1)
    .replace("kind: embedded", "kind: sglang")
    + "router: {kind: sglang}\n"
)


@pytest.mark.parametrize("setting", PATHS)
def test_every_path_may_have_a_home_a_variable_and_spaces(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path := tmp_path / "run.yaml").write_text(WITH_PATHS)
    monkeypatch.setenv("HOME", "/home/a b")
    monkeypatch.setenv("SCRATCH", "/scratch/ü 1")
    section, _, key = setting.rpartition(".")
    for written, meant in [
        ("~/x y", "/home/a b/x y"),
        ("$SCRATCH/x", "/scratch/ü 1/x"),
        ("${SCRATCH}x", "/scratch/ü 1x"),
        ("$$/5$", "$$/5$"),
    ]:
        config = load_config(path, [f"{setting}={written}"])
        holder = getattr(config, section) if section else config
        assert str(getattr(holder, key)) == meant
        (again := tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config(again) == config
    for written, says in [
        ("$NOT_SET/x", "the environment variable NOT_SET in .* is not set"),
        ("~nobody-here/x", "the home folder ~nobody-here .*is not known"),
    ]:
        with pytest.raises(ConfigError, match=rf"override .*: {re.escape(setting)}: {says}") as caught:
            load_config(path, [f"{setting}={written}"])
        assert len(str(caught.value).splitlines()) == 1


def test_a_url_of_a_store_keeps_its_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "run.yaml").write_text(VALID)
    monkeypatch.setenv("BUCKET", "weights")
    config = load_config(path, ["publish.folder=s3://$BUCKET/~a//b"])
    assert config.publish.folder == "s3://weights/~a//b"
