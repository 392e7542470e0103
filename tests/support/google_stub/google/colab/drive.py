"""Drive with the side effects of the real one.

COLAB_STUB/drive is the mount as this machine sees it, COLAB_STUB/cloud what drive.google.com and every other machine
see, COLAB_STUB/lost the uploads that wait on this machine while its mount is gone. Each mount that is not there yet
asks for permission: somebody is at the browser for `visits` of them (a file with a number, else 1). COLAB_STUB/refuse
holds the error of those who come too late: "ValueError" or "MessageError". `flush_fails`: so does the flush.
"""

import contextlib
import errno
import os
import shutil
import sys
from pathlib import Path

from google.colab import folder, note
from google.colab._message import MessageError


def view() -> Path:
    return folder() / "drive"


def mount(mountpoint: str, force_remount: bool = False, timeout_ms: int = 120_000, readonly: bool = False) -> None:
    if " " in mountpoint:
        raise ValueError("Mountpoint must not contain a space.")
    note(f"drive.mount {mountpoint}{' again' if force_remount else ''}")
    if is_mounted() and not force_remount:
        print(f'Drive already mounted at {mountpoint}; to attempt to forcibly remount, call drive.mount("{mountpoint}"')
        return
    if not is_mounted() and view().exists() and any(view().iterdir()):
        raise ValueError("Mountpoint must not already contain files")
    if is_mounted():
        disconnect()
    _ask()
    with Kernel.away():
        _show()
    print(f"Mounted at {mountpoint}")


def _show() -> None:
    seen = folder() / "lost" if (folder() / "lost").exists() else folder() / "cloud"
    (seen / "MyDrive").mkdir(parents=True, exist_ok=True)
    shutil.copytree(seen, view(), dirs_exist_ok=True)
    shutil.rmtree(folder() / "lost", ignore_errors=True)
    (folder() / "mounted").touch()


def flush_and_unmount(timeout_ms: int = 24 * 60 * 60 * 1000) -> None:
    note("drive.flush_and_unmount")
    if not is_mounted():
        print("Drive not mounted, so nothing to flush and unmount.")
        return
    if (folder() / "flush_fails").exists():
        raise ValueError("flush_and_unmount failed")
    upload()
    (folder() / "mounted").unlink()
    shutil.rmtree(view())
    view().mkdir()


def is_mounted() -> bool:
    return (folder() / "mounted").exists()


def _ask() -> None:
    visits = folder() / "visits"
    left = int(visits.read_text()) if visits.exists() else 1
    if left < 1:
        note("nobody allowed it")
        kind = (folder() / "refuse").read_text() if (folder() / "refuse").exists() else "MessageError"
        if kind == "ValueError":
            raise ValueError("mount failed")
        raise MessageError("Error: credential propagation was unsuccessful")
    visits.write_text(str(left - 1))


# What tests do to it


def upload() -> None:
    """Everything that was written arrives."""
    shutil.rmtree(folder() / "cloud", ignore_errors=True)
    shutil.copytree(view(), folder() / "cloud")


def disconnect() -> None:
    """The connection is lost (errno 107). What waits for its upload stays on this machine."""
    view().rename(folder() / "lost")
    (folder() / "mounted").unlink()
    view().mkdir()


def end_machine(upload_first: bool = False) -> None:
    """The machine goes. What was not uploaded has arrived by name alone: files of 0 bytes; deletions have arrived."""
    cloud, waiting = folder() / "cloud", folder() / ("drive" if is_mounted() else "lost")
    if upload_first:
        upload()
    files = [path for path in cloud.rglob("*") if path.is_file()]
    contents = {path.read_bytes() for path in files}  # a name that was changed has arrived with what it names
    for file in files:
        if not (waiting / file.relative_to(cloud)).exists():
            file.unlink()
    for path in sorted(waiting.rglob("*")):
        there = cloud / path.relative_to(waiting)
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        else:
            content = path.read_bytes()
            there.write_bytes(content if content in contents else b"")
    for name in ("drive", "lost"):
        shutil.rmtree(folder() / name, ignore_errors=True)
    for name in ("mounted", "visits"):
        (folder() / name).unlink(missing_ok=True)


class Kernel:
    """The file system's side, by Python's audit events: calls on a lost mount fail, and the bin counts what is deleted.

    disconnect_at: the number of the call on the mount at which the connection is lost.
    """

    hooked: "Kernel | None" = None

    @classmethod
    @contextlib.contextmanager
    def away(cls):
        """What Colab itself does on the mount is not counted."""
        kernel, cls.hooked = cls.hooked, None
        yield
        cls.hooked = kernel

    def __init__(self, disconnect_at: int = 0):
        self.calls, self.bin, self.disconnect_at, self.busy = 0, 0, disconnect_at, False
        if Kernel.hooked is None:
            sys.addaudithook(lambda event, arguments: Kernel.hooked and Kernel.hooked.audit(event, arguments))
        Kernel.hooked = self

    def audit(self, event: str, arguments: tuple) -> None:
        if self.busy or not event.startswith(("open", "os.", "shutil.")) or "COLAB_STUB" not in os.environ:
            return
        self.busy = True
        try:
            self._look(event, arguments)
        finally:
            self.busy = False

    def _look(self, event: str, arguments: tuple) -> None:
        texts = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))]
        if event == "os.remove" and isinstance(arguments[1], int) and arguments[1] >= 0:  # relative to an open folder
            texts = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), texts[0])]
        if not any(text.startswith(f"{view()}/") for text in texts):
            return
        self.calls += 1
        if self.calls == self.disconnect_at and is_mounted():
            disconnect()
        if not is_mounted():
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", texts[0])
        gone = {"os.remove": texts[:1], "os.rename": texts[1:]}.get(event, [])
        self.bin += sum(os.path.getsize(path) for path in gone if os.path.isfile(path))
