"""Votes are kept: in one file, by several at once, after a kill, and with nothing of who voted."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from inference_fixtures import ask

from llm_finetuning.evaluation import votes as results
from llm_finetuning.inference import votes

LONG = "ä\u2028 b\n" * 3_000
WRITER = """
import sys
from pathlib import Path
from llm_finetuning.inference.votes import append
for number in range(int(sys.argv[2])):
    vote = {"prompt": f"{sys.argv[3]} {number}", "history": [], "models": ["a", "b"], "choice": "left"}
    append(Path(sys.argv[1]), vote | {"answers": ["\\u00e4\\u2028 b\\n" * 3000, "x"]})
    print(number, flush=True)
"""


def writer(path, count: int, name: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), str(count), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_several_processes_and_threads_add_to_one_file(tmp_path):
    path = tmp_path / "new" / "votes.jsonl"
    processes = [writer(path, 40, name) for name in ("ann", "bob")]
    box = votes.BallotBox(path)

    def visit(number: int) -> None:
        ballot = box.hand_out(f"session {number}", ask(f"cid {number}"), ["a", "b"], [LONG, "x"])
        assert box.vote(f"session {number}", ballot.number, "right")[1]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(40)))
    assert [process.wait(120) for process in processes] == [0, 0]
    for process in processes:
        process.stdout.close()
    found = results.read(path)
    assert Counter(vote["prompt"].split()[0] for vote in found) == {"ann": 40, "bob": 40, "cid": 40}
    assert {vote["answers"][0] for vote in found} == {LONG}


def test_a_killed_process_costs_at_most_the_vote_that_it_was_writing(tmp_path):
    path = tmp_path / "votes.jsonl"
    process = writer(path, 10**6, "ann")
    for _ in range(30):
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(results.read(path)) >= said + 1


@pytest.mark.parametrize("left", [1, 40, 5_000, -1])
def test_a_line_that_was_cut_off_is_no_vote_and_spoils_none(tmp_path, left):
    """Whatever of the last line reached the disk: a kill in the middle of a letter, or before the line's end."""
    path = tmp_path / "votes.jsonl"
    vote = votes.Ballot("n", ask("ä" * 9_000), ["a", "b"], ["x", "y"]).record("left")
    votes.append(path, vote)
    whole = path.stat().st_size
    votes.append(path, vote)
    os.truncate(path, whole + left if left > 0 else 2 * whole - 1)
    votes.append(path, vote)
    assert results.read(path) == [vote] * (2 if left > 0 else 3)


def test_a_short_write_is_an_error_and_spoils_no_later_vote(tmp_path):
    """A disk that is full in the middle of a line."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
    limited += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);" + WRITER
    path = tmp_path / "votes.jsonl"
    done = subprocess.run([sys.executable, "-c", limited, str(path), "9", "ann"], capture_output=True, text=True)
    assert done.returncode == 1 and "Error" in done.stderr
    kept = len(done.stdout.split())
    assert 1 <= kept < 9 and len(results.read(path)) == kept
    votes.append(path, {"prompt": "q", "history": [], "models": ["a", "b"], "answers": ["x", "y"], "choice": "tie"})
    assert len(results.read(path)) == kept + 1


def test_both_orders_are_drawn_from_any_two_models():
    drawn = Counter(tuple(votes.draw(["a", "b", "c"])) for _ in range(600))
    assert len(drawn) == 6 and min(drawn.values()) > 50  # 100 each; fewer than 50 once in ten million


def test_a_question_counts_once_a_session_and_a_session_that_left_is_forgotten(tmp_path):
    box = votes.BallotBox(tmp_path / "votes.jsonl")

    def vote(session: str, messages: list[dict], choice: str = "left") -> bool:
        return box.vote(session, box.hand_out(session, messages, ["a", "b"], ["x", "y"]).number, choice)[1]

    assert vote("ann", ask("What is it?")) and not vote("ann", ask("what  is it"), "right")
    assert vote("ann", ask("What is it?", "Hello.", "Hi.")) and vote("bob", ask("What is it?"))
    persona = [{"role": "system", "content": "Be brief."}, *ask("What is it?")]
    assert vote("ann", persona)
    box.leave("ann")
    assert box._open == {} and set(box._voted) == {"bob"}
    kept = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_bytes().splitlines()]
    assert [vote["history"] for vote in kept] == [[], ask("What is it?", "Hello.", "Hi.")[:-1], [], persona[:1]]


def test_the_box_in_a_notebook_asks_once_without_names_and_shows_markup_as_text(tmp_path):
    pytest.importorskip("ipywidgets", reason="the box needs ipywidgets: pip install ipywidgets")
    from llm_finetuning.inference.vote_box import vote_box

    told = {"tuned-7f3a": "<b>yes</b>\n  indented", "plain-c41d": "no"}
    asked = [
        (ask("Is <i>it</i> so?", "Hi.", "Hello."), told),
        (ask("Are they alike?"), {"tuned-7f3a": "same", "plain-c41d": "same"}),
        (ask("Last?"), told | {"third-99aa": "perhaps"}),
    ]
    path = tmp_path / "votes.jsonl"
    view = vote_box(asked, votes.BallotBox(path), lambda: results.so_far(path, list(told)))
    shown, row, status = view.children
    left, right, tie, _ = row.children
    first = shown.value
    assert (
        "&lt;b&gt;yes&lt;/b&gt;\n  indented" in first and "Is &lt;i&gt;it&lt;/i&gt; so?" in first and "Hello." in first
    )
    assert not any(model in first + status.value for model in told)
    right.click()
    assert "Last?" in shown.value and results.so_far(path, list(told)) in status.value
    tie.click()
    kept = results.read(path)
    assert [(vote["prompt"], vote["choice"]) for vote in kept] == [("Is <i>it</i> so?", "right"), ("Last?", "tie")]
    letter = first.index("<b>A</b>") < first.index("&lt;b&gt;yes") < first.index("<b>B</b>")
    assert kept[0]["models"] == (list(told) if letter else list(told)[::-1])
    assert "no more questions" in shown.value and left.disabled
