"""The files with a run's samples: one a step and rank. Reading them needs PyArrow only."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from millrace.errors import DataError

FOLDER = "samples"  # of a run's folder
NAME = re.compile(r"step-(\d+)(?:-rank(\d+))?\.(parquet|partial)")


def file_name(step: int, rank: int) -> str:
    """Return the name of the file with the samples of a step and rank."""
    return f"step-{step:06d}{f'-rank{rank}' if rank else ''}.parquet"


def sample_files(run: Path) -> list[Path]:
    """Return the files of a run's samples, by step and rank."""
    named = [(found, path) for path in (run / FOLDER).glob("*.parquet") if (found := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named, key=lambda one: (int(one[0][1]), int(one[0][2] or 0)))]


def forget_samples(run: Path, after: int) -> None:
    """Remove the files of steps after a step, and those that were not finished. Raises OSError."""
    for path in (run / FOLDER).glob("*"):
        found = NAME.fullmatch(path.name)
        if found is not None and (int(found[1]) > after or found[3] == "partial"):
            path.unlink()


def read_samples(run: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a run's folder as dicts, step by step. Their `messages` are lists of chat messages.

    >>> solved = [sample for sample in read_samples("runs/NAME") if sample["reward"] == 1]

    Raises DataError if there are none, or a file is damaged.
    """
    files = sample_files(Path(run))
    if not files:
        raise DataError(f"{Path(run) / FOLDER} has no samples; give the folder of a run that has ended its first step")
    for path in files:
        try:
            table = parquet.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
        for row in table.to_pylist(maps_as_pydicts="strict"):
            yield {**row, "messages": json.loads(row["messages"])}
