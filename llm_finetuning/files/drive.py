"""Google Drive as Colab mounts it: writes wait on the VM's disk for their upload, and deleted files go to a bin.

A mount that is gone leaves an empty folder, which must not be filled: see `check_mounted`.
"""

import contextlib
import errno
import os
import shutil
import sys
from pathlib import Path

MOUNT = Path("/content/drive")
CACHE = Path("/content")
"""On the VM's disk, where what is written to Drive waits for its upload."""


def in_colab() -> bool:
    """Whether this process runs on a Colab machine: a notebook there, or a script started in its terminal."""
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def on_drive(path: str | Path) -> bool:
    """Whether `path` lies on the Drive that Colab mounts."""
    return in_colab() and MOUNT in Path(path).absolute().parents


def check_folders(folders: dict[str, str]) -> None:
    """Checks folders by the names of their parameters, before anything is made in one of them.

    Raises ValueError for those of Colab's where this is not Colab, and what `check_mounted` raises.
    """
    colabs = {name: folder for name, folder in folders.items() if CACHE in (Path(folder), *Path(folder).parents)}
    if colabs and not in_colab():
        given = ", ".join(f"{name} = {folder!r}" for name, folder in colabs.items())
        raise ValueError(
            f"{given}: Colab's, and this is not Colab. Say `make run` in a terminal, which runs the notebooks on this"
            f" machine, or set {' and '.join(colabs)} to a folder of this machine"
        )
    for folder in colabs.values():
        check_mounted(folder)


def check_mounted(path: str | Path) -> None:
    """Raises OSError (ENOTCONN) where `path` lies on Drive and that is not mounted, or its connection is lost.

    A folder made there would stand on the VM's disk, be uploaded by nobody, and refuse the next mount.
    """
    if not on_drive(path):
        return
    root = MOUNT / Path(path).absolute().relative_to(MOUNT).parts[0]
    if not os.path.isdir(root):  # False for errno 107 too
        raise lost(path)


def make_parent(path: Path) -> None:
    """Makes the folder that `path` lies in; raises what `check_mounted` raises, before anything is made."""
    check_mounted(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def lost(path: str | Path) -> OSError:
    """Returns the error for a path on a Drive that is not mounted, with what the user does."""
    return OSError(
        errno.ENOTCONN,
        f"{path} cannot be reached: Drive is not mounted, or its connection is lost. Run the set-up cell (the second"
        " one) again and allow access, then this cell.",
    )


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Removes a file or a folder; on Drive every file is emptied first, for its bin counts them for 30 days.

    Of a symbolic link the link goes, and what it leads to stays.
    """
    is_folder = path.is_dir() and not path.is_symlink()
    with contextlib.suppress(OSError) if ignore_errors else contextlib.nullcontext():
        files = path.rglob("*") if is_folder else [path]
        for file in files if on_drive(path) else []:
            if file.is_file() and not file.is_symlink():
                os.truncate(file, 0)
        if not is_folder:
            path.unlink(missing_ok=True)
    if is_folder:
        shutil.rmtree(path, ignore_errors)
