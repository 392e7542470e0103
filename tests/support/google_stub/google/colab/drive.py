"""Drive: `mount` refuses what the real one refuses, and then makes COLAB_STUB/drive/MyDrive."""

from google.colab import folder, note


def mount(mountpoint: str, force_remount: bool = False) -> None:
    if " " in mountpoint:
        raise ValueError("Mountpoint must not contain a space.")
    if (folder() / "refuse_drive").exists():
        raise ValueError("mount failed")
    note(f"drive.mount {mountpoint}{' again' if force_remount else ''}")
    (folder() / "drive" / "MyDrive").mkdir(parents=True, exist_ok=True)
    print(f"Mounted at {mountpoint}")


def flush_and_unmount() -> None:
    note("drive.flush_and_unmount")
