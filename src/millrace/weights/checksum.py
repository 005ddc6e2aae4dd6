"""The checksum by which an engine's weights are compared with what was sent."""

import xxhash


def checksum(data: memoryview) -> str:
    """XXH3-64 of a tensor's bytes in row-major order, as 16 hex digits. About 30 GB/s on one core: cheap enough to be
    always on.

    It tells a damaged or a wrong tensor from the right one; it is no defence against somebody who forges one.
    """
    return xxhash.xxh3_64(data).hexdigest()
