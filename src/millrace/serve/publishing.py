"""Publishing a folder's weights at the request of another process."""

from pathlib import Path

from millrace.errors import PublishError
from millrace.fleet.client import FleetClient
from millrace.fleet.fleet import Fleet
from millrace.weights.folder import FolderTensors


async def publish_folder(fleet: FleetClient, folder: Path) -> dict[str, object]:
    """Publish the weights of a folder in Hugging Face's format, and return the version and the engines that failed.

    folder: one that this host can read. Raises PublishError if this process only follows the fleet, or the publish
    fails, and DataError if the folder has no weights.
    """
    if not isinstance(fleet, Fleet):
        raise PublishError("this process follows the fleet of another, and only its owner can update weights")
    tensors = FolderTensors(folder)
    report = await fleet.publish(lambda: tensors, label=folder.name)
    return {"version": report.version, "failed": {name: str(why) for name, why in report.failed.items()}}
