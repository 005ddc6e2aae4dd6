"""The versions of verl that this integration was tested with."""

TESTED = ("0.9.1",)
NAME = "millrace"  # rollout.name, and checkpoint_engine.backend


def untested() -> str | None:
    """Return what is wrong with the installed version of verl; None if it was tested."""
    from verl import __version__

    if __version__ in TESTED:
        return None
    return (
        f"it was tested with verl {', '.join(TESTED)}, and verl {__version__} is installed. It uses parts of verl that "
        f"change between versions, so install the tested one: pip install verl=={TESTED[-1]}"
    )


def require_tested() -> None:
    """Raise ImportError if the installed version of verl was not tested."""
    if (reason := untested()) is not None:
        raise ImportError(f"rollout.name=millrace is refused: {reason}")
