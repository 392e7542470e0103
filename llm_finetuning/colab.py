"""Brings a bare Google Colab runtime to work: mounts Drive and installs what is missing, never its torch or numpy.

Only the standard library and `packaging` (part of every Colab image) are imported here: nothing else is
certain to be installed yet.
"""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from llm_finetuning.files import drive

FIXED = ("torch", "numpy")
"""Colab's own builds: they match its driver and each other, and are never replaced."""
TORCHAO_NEEDED = Version("0.16")
"""PEFT raises ImportError at the merge with an older torchao, also where torchao is not used."""


class RestartNeeded(RuntimeError):
    """A package was replaced after it had been imported. Notebooks show the sentence alone."""


def install(clone: Path) -> None:
    """Mounts Drive, and installs what `clone`/requirements.txt asks for and this runtime lacks.

    Everything else stays as it is. Raises ConnectionError when Drive is refused, RuntimeError when torch or numpy is
    too old or pip fails, RestartNeeded when the session has to be restarted: whatever was replaced had been imported
    before.
    """
    mount_drive()
    requirements = read_requirements(clone / "requirements.txt")
    lacking = [r for r in requirements if not is_met(r)]
    if old := [r for r in lacking if r.name in FIXED]:
        raise RuntimeError(
            f"This runtime has no {' and no '.join(map(str, old))}, and they are never replaced here. Choose "
            "Runtime > Change runtime type > Runtime version: Latest, and run all cells again."
        )
    if lacking:
        _pip("install", "--constraint", str(_constraints(requirements, lacking)), *map(str, lacking))
        importlib.invalidate_caches()
        print("Installed", ", ".join(f"{r.name} {metadata.version(r.name)}" for r in lacking))
    remove_old_torchao()
    if stale := replaced_after_import(requirements):
        raise RestartNeeded(
            "Please choose Runtime > Restart session, then run all cells again: packages in use were updated "
            f"({', '.join(stale)})."
        )


def mount_drive(again: bool = False) -> None:
    """Mounts Drive in Colab, where it is not mounted yet; again: also where it is, for its connection is lost.

    Colab asks the user for permission. Raises ConnectionError for whatever comes of that: its classes have changed.
    """
    if "google.colab" not in sys.modules:
        return
    from google.colab import drive as colab_drive

    try:
        colab_drive.mount(str(drive.MOUNT), force_remount=again)
    except Exception as error:
        cure = (
            f"Files lie in {drive.MOUNT} that were written while Drive was not mounted: move them away "
            f"(!mv {drive.MOUNT} {drive.MOUNT}-before), and run the set-up cell again."
            if "already contain files" in str(error)
            else "Run the set-up cell again and allow access in the window that opens, with this notebook's account."
        )
        raise ConnectionError(f"Drive was not mounted ({_named(error)}). {cure}") from error


def flush_drive(folder: Path, hours: float = 1) -> str:
    """Waits until Drive has uploaded what was written, and unmounts it; returns what the notebook says of it.

    It comes last, for to mount Drive again Colab asks for permission again. A failure costs nothing: the upload goes
    on. Outside Colab, and where `folder` is not on Drive, nothing is waited for.
    """
    if not drive.on_drive(folder) or "google.colab" not in sys.modules:
        return f"Everything lies in {folder}."
    from google.colab import drive as colab_drive

    try:
        drive.check_mounted(folder)  # else Colab says nothing, and nothing is waited for
        colab_drive.flush_and_unmount(timeout_ms=round(hours * 3_600_000))
    except Exception as error:
        return (
            f"Drive did not say that everything is uploaded ({_named(error)}). Nothing is lost: all files were written"
            f" to {folder} and read back, and their upload goes on while this runtime is connected. Before you"
            " disconnect it, look at drive.google.com: files of 0 bytes are still on their way."
        )
    return (
        f"Uploaded: everything in {folder} is on Drive, which is unmounted now. Run all mounts it again, and asks for"
        " access again."
    )


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {(getattr(error, 'strerror', None) or str(error)).rstrip('.')}"


def read_requirements(path: Path) -> list[Requirement]:
    """Reads a requirements.txt that holds names, versions and comments only."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def is_met(requirement: Requirement) -> bool:
    """Returns whether the package is installed in a version that the requirement accepts."""
    version = installed(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def installed(name: str) -> str | None:
    """Returns the installed version of a package, None without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def remove_old_torchao() -> None:
    """Uninstalls a torchao that PEFT refuses to run beside; nothing here uses it."""
    version = installed("torchao")
    if version is not None and Version(version) < TORCHAO_NEEDED:
        _pip("uninstall", "--yes", "torchao")
        importlib.invalidate_caches()
        print(f"Removed torchao {version}: PEFT would stop at the merge because of it")


def replaced_after_import(requirements: list[Requirement]) -> list[str]:
    """Returns the packages of which this process runs another version than the installed one."""
    names = {r.name.lower() for r in requirements}
    return sorted(
        distribution
        for module, distributions in metadata.packages_distributions().items()
        for distribution in distributions
        if distribution.lower() in names
        and getattr(sys.modules.get(module), "__version__", metadata.version(distribution))
        != metadata.version(distribution)
    )


def token(name: str = "HF_TOKEN", seconds: int = 60) -> str | None:
    """Returns a secret from the environment, else from Colab's secrets (the key in the left bar), else None.

    Colab's secrets wait for ever where no browser shows the notebook, so they get `seconds` to answer.
    """
    if os.environ.get(name) or "google.colab" not in sys.modules:
        return os.environ.get(name) or None
    from google.colab import userdata

    before = signal.signal(signal.SIGALRM, _time_is_up)
    signal.alarm(seconds)
    try:
        return userdata.get(name) or None
    except (userdata.SecretNotFoundError, userdata.NotebookAccessError, _TimeIsUp):
        return None
    except Exception as error:  # newer images only: its class does not exist in the others
        if type(error).__name__ != "TimeoutException":
            raise
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def hub_token() -> str:
    """Returns the Hub's token from HF_TOKEN, Colab's secrets or `hf auth login`, or raises PermissionError."""
    found = token()
    if not found and "google.colab" not in sys.modules:  # there get_token would wait for the secret for ever
        from huggingface_hub import get_token

        found = get_token()
    if not found:
        raise PermissionError(
            "No token for the Hugging Face Hub. In Colab add the secret HF_TOKEN (the key in the left bar) "
            "and allow this notebook to read it; elsewhere set the environment variable HF_TOKEN, "
            "or run `hf auth login`."
        )
    return found


class _TimeIsUp(BaseException):
    """Raised when a secret takes too long. Not an Exception, because google.colab swallows those while it waits."""


def _time_is_up(*_: object) -> None:
    raise _TimeIsUp


def _constraints(requirements: list[Requirement], lacking: list[Requirement]) -> Path:
    """Writes a constraints file that keeps every package whose version is accepted as it is."""
    pins = [f"{r.name}=={metadata.version(r.name)}" for r in requirements if r not in lacking]
    path = Path(tempfile.mkdtemp()) / "constraints.txt"
    path.write_text("\n".join(pins) + "\n", encoding="utf-8")
    return path


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(arguments)} failed:\n{done.stderr.strip()}")
