"""The labels of versions."""

from millrace.fleet.labels import REMEMBERED, Labels


def test_only_the_newest_labels_are_kept() -> None:
    labels = Labels()
    for version in range(REMEMBERED + 3):
        labels.put(version, f"step {version}")
    labels.put(REMEMBERED, None)
    assert list(labels) == [*range(3, REMEMBERED), REMEMBERED + 1, REMEMBERED + 2]
    assert labels[REMEMBERED + 2] == f"step {REMEMBERED + 2}"
