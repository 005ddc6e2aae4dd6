"""What each tracker has of a run, read back by the tracker's own reader."""

import importlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Points = Mapping[str, list[tuple[int, float]]]


@dataclass(slots=True)
class Recorded:
    """points: of each figure, its steps and values in the order in which they were recorded. rows: of each step's
    table of samples. settings: the run's. runs: how many runs the tracker has."""

    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    rows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    state: str = ""
    runs: int = 0


def tensorboard(folder: Path) -> Recorded:
    event_accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    read = Recorded(runs=1)
    for name in events.Tags()["scalars"]:
        read.points[name] = [(event.step, event.value) for event in events.Scalars(name)]
    texts = {
        tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    for step, text in texts.get("samples", []):
        head, _, *rows = _cells(text)
        read.rows[step] = [dict(zip(head, row, strict=True)) for row in rows]
    read.state = texts["state"][-1][1]
    read.settings = {name.replace("&#95;", "_"): value for name, value in _cells(texts["config"][0][1])[2:]}
    return read


def _cells(table: str) -> list[list[str]]:
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.split("\n")]


def wandb(folder: Path) -> Recorded:
    """Reads the files of offline runs, of which each start wrote one."""
    read, ids = Recorded(), set()
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in _wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                read.settings = {one.key: json.loads(one.value_json) for one in record.run.config.update}
            if kind == "exit":
                read.state = {0: "finished", 1: "failed", 255: "interrupted"}[record.exit.exit_code]
            if kind == "history":
                items = {
                    ".".join([one.key, *one.nested_key]).strip("."): json.loads(one.value_json)
                    for one in record.history.item
                }
                step = items.pop("step")
                if table := items.get("samples.path"):
                    content = json.loads((path.parent / "files" / table).read_text())
                    read.rows[step] = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
                    continue
                for name, value in items.items():
                    if not name.startswith("_"):
                        read.points.setdefault(name, []).append((step, value))
    read.runs = len(ids)
    return read


def _wandb_records(path: Path) -> Iterator[Any]:
    """Yields the records of a file in LevelDB's log format, below a header of 7 bytes."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = messages.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def mlflow(folder: Path) -> Recorded:
    client = importlib.import_module("mlflow").MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    id_of_run = json.loads((folder / "trackers.json").read_text())["mlflow"]
    run = client.get_run(id_of_run)
    read = Recorded(settings=run.data.params, runs=len(client.search_runs([run.info.experiment_id])))
    read.state = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted"}[run.info.status]
    for name in run.data.metrics:
        history = sorted(client.get_metric_history(id_of_run, name), key=lambda metric: metric.timestamp)
        read.points[name] = [(metric.step, metric.value) for metric in history]
    for artifact in client.list_artifacts(id_of_run, "samples"):
        table = json.loads(Path(client.download_artifacts(id_of_run, artifact.path)).read_text())
        step = int(artifact.path.removesuffix(".json").rpartition("-")[2])
        read.rows[step] = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return read


def trackio(folder: Path) -> Recorded:
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    name = json.loads((folder / "trackers.json").read_text())["trackio"]
    read = Recorded(runs=len(storage.get_run_records("millrace")), settings=storage.get_run_config("millrace", name))
    for log in storage.get_logs("millrace", name):
        if "samples" in log:
            read.rows[log["step"]] = log["samples"]["_value"]
            continue
        for figure, value in log.items():
            if figure not in ("step", "timestamp"):
                read.points.setdefault(figure, []).append((log["step"], value))
    alerts = storage.get_alerts("millrace", run_name=name)
    ends = {"the run has failed": "failed", "the run was interrupted": "interrupted"}
    read.state = ends[max(alerts, key=lambda alert: alert["timestamp"])["title"]] if alerts else "finished"
    return read


READERS: Mapping[str, Callable[[Path], Recorded]] = {
    "tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio,
}  # fmt: skip
