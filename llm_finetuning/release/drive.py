"""Google Drive as Colab mounts it: writes land on the VM's disk first and are uploaded later."""

import sys
from pathlib import Path

MOUNT = Path("/content/drive")
CACHE = Path("/content")  # on the VM's disk, where what is written to Drive waits for its upload


class Drive:
    """The mounted Drive; `flush` waits for its uploads, `remount` brings back a mount that has died."""

    cache = CACHE

    def flush(self) -> None:
        """Waits until everything is uploaded, and mounts again, so that what is read next comes from Drive."""
        from google.colab import drive

        drive.flush_and_unmount()
        drive.mount(str(MOUNT))

    def remount(self) -> None:
        """Mounts Drive again after the connection was lost (errno 107)."""
        from google.colab import drive

        drive.mount(str(MOUNT), force_remount=True)


def drive_below(path: str | Path) -> Drive | None:
    """Returns the Drive that `path` lies on; None outside Colab and for a path on a disk."""
    in_colab = "google.colab" in sys.modules
    return Drive() if in_colab and MOUNT in Path(path).absolute().parents else None
