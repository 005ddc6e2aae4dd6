"""The numbers and labels of weight versions: what callers pass, and the labels that a fleet remembers."""

from collections.abc import Iterator, Mapping

from millrace import arguments
from millrace.errors import ArgumentError, PublishError

REMEMBERED = 256  # newest labels; tokens of older versions are too stale to train on

Label = str | int


def version_number(version: object) -> int | None:
    """Return the version as an int, or None for the next one. Raises PublishError if it is not an integer."""
    if version is None:
        return None
    try:
        return arguments.whole("version", version)
    except ArgumentError:
        raise PublishError(f"version must be an integer, and is {version!r}") from None


def label_value(label: object) -> Label | None:
    """Return the label as text or an int. Raises ArgumentError if it is something else."""
    if label is None:
        return None
    if isinstance(label, str):
        return arguments.text("label", label)
    try:
        return arguments.whole("label", label)
    except ArgumentError:
        raise ArgumentError(f"label must be text or an integer, and is {arguments.shown(label)}") from None


class Labels(Mapping[int, Label]):
    """The labels of the newest versions, by version. Versions without a label are missing."""

    def __init__(self) -> None:
        self._labels: dict[int, Label] = {}

    def __getitem__(self, version: int) -> Label:
        return self._labels[version]

    def __iter__(self) -> Iterator[int]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __repr__(self) -> str:
        return f"Labels({self._labels})"

    def put(self, version: int, label: Label | None) -> None:
        """Set the label of a version. None removes it. The label that was set first is forgotten if there are many."""
        self._labels.pop(version, None)
        if label is not None:
            self._labels[version] = label
        if len(self._labels) > REMEMBERED:
            del self._labels[next(iter(self._labels))]
