"""The set-up cell, to the letter, in a bare Python: which package it finds, and what it says where there is none.

github.com is a folder of git repositories, or a server that asks for a password, or nowhere; Colab's list of sessions
comes from a server of its own. `pytest -s tests/test_set_up.py` prints the matrix.
"""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import nbformat
import packaging
import pytest
from colab_fixtures import STUB

ROOT = Path(__file__).parents[1]
HOME, FORK, BARE, PRIVATE = "mkthoma/llm_finetuning", "someone/llm_finetuning", "someone/notes", "private/model"
NOTEBOOK = ROOT / "Finetuning" / "Phi-2 QLoRA Finetuning.ipynb"
IN_A_FORK = f"https://github.com/{FORK}/blob/feature/x/Finetuning/Phi-2%20QLoRA%20Finetuning.ipynb"
REMOVED = {"asynchat", "asyncore", "cgi", "crypt", "distutils", "imghdr", "imp", "nntplib", "pipes", "telnetlib"}
"""Of the standard library of 3.11, what 3.13 has not."""
WITHIN = """
import json, os, sys
given = json.load(sys.stdin)
sys.path[:0] = ["", *given["path"]]
import google.colab
told = []
for run in given["runs"]:
    os.environ.update(run.get("environment", {}))
    exec(run.get("before", ""))
    try:
        exec(given["cell"], {"repository": run["repository"]})
        import llm_finetuning.origin
        told.append([llm_finetuning.origin.NAME, llm_finetuning.__file__])
    except Exception as error:
        rendered = getattr(error, "_render_traceback_", lambda: ["Traceback of " + repr(error)])
        told.append(["\\n".join(rendered()), type(error).__name__])
print(json.dumps(told))
"""


def set_up_cell() -> str:
    return [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"][1]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path, name: str) -> str:
    """Commits the package, which says `name` of itself; returns the commit."""
    (folder / "llm_finetuning" / "origin.py").write_text(f"NAME = {name!r}\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", name)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def github(tmp_path_factory):
    """(folder of repositories by owner/name, a commit of the project's first version)."""
    folder = tmp_path_factory.mktemp("github")
    for name in (HOME, BARE):
        (folder / name).mkdir(parents=True)
        git(folder / name, "init", "--quiet")
    small = shutil.ignore_patterns("__pycache__", "data", "training", "inference", "evaluation", "release", "runner")
    shutil.copytree(ROOT / "llm_finetuning", folder / HOME / "llm_finetuning", ignore=small)
    (folder / HOME / "requirements.txt").write_text("packaging>=20\n")
    first = commit(folder / HOME, "the project, v1")
    git(folder / HOME, "tag", "v1")
    shutil.copytree(folder / HOME, folder / FORK)
    commit(folder / HOME, "the project")
    commit(folder / FORK, "the fork")
    git(folder / FORK, "checkout", "--quiet", "-b", "feature/x")
    commit(folder / FORK, "the fork's branch")
    git(folder / FORK, "checkout", "--quiet", "-")
    (folder / BARE / "notes.txt").write_text("no package\n")
    git(folder / BARE, "add", ".")
    git(folder / BARE, "commit", "--quiet", "-m", "notes")
    return folder, first


@pytest.fixture(scope="module")
def server():
    """Colab's own server, which lists `server.paths`, and one that asks for a password wherever else it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            is_list = self.path == "/api/sessions"
            self.send_response(200 if is_list else 401)
            if not is_list:
                self.send_header("WWW-Authenticate", "Basic")
            self.end_headers()
            if is_list:
                sessions = [{"path": path, "name": "a.ipynb", "kernel": {"id": "1"}} for path in made.paths]
                self.wfile.write(json.dumps(sessions).encode())

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.paths = []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def few_commands(tmp_path_factory) -> str:
    """A PATH without git."""
    folder = tmp_path_factory.mktemp("bin")
    for name in filter(shutil.which, ("sh", "curl", "rm", "mv")):
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def bare_path(folder: Path) -> list[str]:
    """What Colab's bare Python can import beside the standard library: google.colab and packaging."""
    alone = folder / "alone"
    alone.mkdir()
    (alone / "packaging").symlink_to(Path(packaging.__file__).parent)
    told = Path(importlib.metadata.distribution("packaging")._path)
    (alone / told.name).symlink_to(told)
    return [str(STUB), str(alone)]


def instead(**places: str) -> dict[str, str]:
    """Environment in which git fetches from another place instead; keys: what stands behind https://github.com/."""
    found = {"GIT_CONFIG_COUNT": str(len(places))}
    for number, (prefix, place) in enumerate(places.items()):
        found[f"GIT_CONFIG_KEY_{number}"] = f"url.{place}.insteadOf"
        found[f"GIT_CONFIG_VALUE_{number}"] = f"https://github.com/{prefix.strip('_')}"
    return found


def run_cell(folder: Path, runs: list[dict], environment: dict, python: str | None = None) -> list[list[str]]:
    """Runs the set-up cell for each of `runs` in one process of a bare Python; returns what each brought."""
    content = folder / "content"
    content.mkdir(exist_ok=True)
    (folder / "stub").mkdir(exist_ok=True)
    done = subprocess.run(
        [python or sys._base_executable, "-I", "-S", "-c", WITHIN],
        input=json.dumps({"cell": set_up_cell(), "path": bare_path(folder), "runs": runs}),
        cwd=content,
        capture_output=True,
        text=True,
        env=os.environ | {"COLAB_STUB": str(folder / "stub")} | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


NAMESPACE = "import os; os.makedirs('llm_finetuning'); open('llm_finetuning/thesis.txt', 'w'); import llm_finetuning"
CUT = "import shutil; shutil.rmtree('llm_finetuning/llm_finetuning'); os.makedirs('llm_finetuning.new/half')"
AT_HOME, AWAY = "the project", "sentence: "
CASES = {
    # what is asked, where the notebook was opened, what lies there: (first run, second run), what each brings
    "empty, opened from a fork's branch": ([{}, {}], ["the fork's branch"] * 2, IN_A_FORK),
    "empty, opened from a copy on Drive": ([{}, {}], [AT_HOME] * 2, "fileId=1aBcD"),
    "empty, and Colab lists nothing": ([{}], [AT_HOME], None),
    "owner/name over the project's clone": ([{}, {"repository": FORK}, {}], [AT_HOME, "the fork", AT_HOME], None),
    "a tag, then none": ([{"repository": f"{HOME}@v1"}, {"repository": HOME}], ["the project, v1", AT_HOME], None),
    "an address with a commit, from a fork": (
        [{"repository": "COMMIT"}] * 2,
        ["the project, v1"] * 2,
        IN_A_FORK,
    ),
    "no package in it, then corrected": ([{"repository": BARE}, {}], [f"{AWAY}llm_finetuning/colab.py", AT_HOME], None),
    "a user's folder of that name, imported": ([{"before": NAMESPACE}, {}], [AT_HOME] * 2, None),
    "a clone that was cut off": ([{}, {"before": CUT}], [AT_HOME] * 2, None),
    "a tag that is not there, then one that is": (
        [{"repository": f"{HOME}@v9"}, {"repository": f"{HOME}@v1"}],
        [f"{AWAY}v9", "the project, v1"],
        None,
    ),
    "private, then public": ([{"repository": PRIVATE}, {}], [f"{AWAY}could not read Username", AT_HOME], None),
    "a list, nothing, and lines that run on": (
        [{"repository": ["a/b"]}, {"repository": None}, {"repository": f"{HOME}@v1\nand more"}],
        [f"{AWAY}a/b", AT_HOME, f"{AWAY}v1"],
        None,
    ),
    "nothing of that name": ([{"repository": "nobody/nothing"}, {"repository": "nonsense"}], [AWAY, AWAY], None),
    "no network, then there is": (
        [{"environment": "offline"}, {"environment": "online"}],
        [f"{AWAY}Could not resolve host", AT_HOME],
        None,
    ),
    "no network, and the clone lies there": ([{}, {"environment": "offline"}], [AT_HOME] * 2, None),
    "no git": ([{"environment": "no git"}], [f"{AWAY}git: not found"], None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_set_up_matrix(case, tmp_path, github, server, few_commands):
    folder, first = github
    runs, expected, opened = CASES[case]
    if opened and not shutil.which("curl"):
        pytest.skip("Colab has curl, this machine has not")
    server.paths = [opened and f"fileId={quote(opened, safe='')}", opened and "other.ipynb"] if opened else []
    online = instead(_=f"file://{folder}/", private=f"http://127.0.0.1:{server.server_port}/private")
    environments = {"online": online, "offline": instead(_="http://nowhere.invalid/"), "no git": {"PATH": few_commands}}
    given = [
        {"before": run.get("before", ""), "environment": environments.get(run.get("environment"), {})}
        | {"repository": f"https://github.com/{HOME}@{first[:9]}" if repository == "COMMIT" else repository}
        for run in runs
        for repository in [run.get("repository", "")]
    ]
    colab = {"COLAB_JUPYTER_IP": "127.0.0.1", "KMP_TARGET_PORT": str(server.server_port)}
    told = run_cell(tmp_path, given, online | colab)
    for run, (found, what), wanted in zip(given, told, expected, strict=True):
        print(f"\n{case} | repository = {run['repository']!r} | {found}", end="")
        if not wanted.startswith(AWAY):
            assert found == wanted
            assert what == str(tmp_path / "content" / "llm_finetuning" / "llm_finetuning" / "__init__.py")
            continue
        assert wanted.removeprefix(AWAY) in found and "\n" not in found
        assert found.startswith(f"repository = {str(run['repository'] or HOME)!r}") and "public owner/name" in found
        assert what == "NotFetched"


def test_what_lay_there_before_is_kept_beside_the_clone(tmp_path, github):
    run_cell(tmp_path, [{"repository": HOME, "before": NAMESPACE}], instead(_=f"file://{github[0]}/"))
    assert (tmp_path / "content" / "llm_finetuning.~1~" / "thesis.txt").exists()
    assert not (tmp_path / "content" / "llm_finetuning.new").exists()


@pytest.mark.parametrize("error", ["MessageError", "ValueError"])
def test_a_drive_that_nobody_allows_is_one_sentence(error, tmp_path, github):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "visits").write_text("0")
    (tmp_path / "stub" / "refuse").write_text(error)
    ((found, what),) = run_cell(tmp_path, [{"repository": HOME}], instead(_=f"file://{github[0]}/"))
    assert what == "ConnectionError"
    assert f"Drive was not mounted ({error}: " in found


def test_the_cell_runs_in_colabs_python(tmp_path, github):
    """Colab has 3.13; where that is not installed, syntax and modules are looked at."""
    tree = ast.parse(set_up_cell())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names <= sys.stdlib_module_names - REMOVED
    python = shutil.which("python3.13")
    if python and works(python):
        told = run_cell(tmp_path, [{"repository": HOME}] * 2, instead(_=f"file://{github[0]}/"), python)
        assert [name for name, _ in told] == ["the project"] * 2


def works(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
