"""Exit statuses that the commands share."""

INTERRUPTED = 130  # 128 + SIGINT, as shells count
