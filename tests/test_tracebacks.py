"""What a notebook shows of an error: a sentence for what the user can cure, the traceback for a fault."""

import json

import pytest
from shell_fixtures import shown

from llm_finetuning.files import checksums, copying
from llm_finetuning.settings import Finetuning, from_cell


def hold(folder):
    """A folder that is not what it says."""
    (folder / "SHA256SUMS").write_text("not a list\n")
    return folder


@pytest.mark.parametrize(
    ("failing", "error", "sentence"),
    [
        (lambda folder: from_cell(Finetuning, {}), ValueError, "model_name is missing: the parameters cell"),
        (lambda folder: Finetuning(lora_r=0), ValueError, "lora_r = 0: at least 1"),
        (lambda folder: checksums.verify_checksums(folder / "none"), FileNotFoundError, "is not there. Run the"),
        (lambda folder: checksums.read_checksums(hold(folder)), ValueError, "SHA256SUMS, line 1 is not"),
        (lambda folder: copying.check_space(folder, 10**19, "A run"), OSError, "A run needs 10,000,000,000.00 GB"),
    ],
)
def test_what_the_user_can_cure_is_a_sentence_and_keeps_its_class(shell, tmp_path, failing, error, sentence):
    text, ended_with = shown(shell, "failing()", failing=lambda: failing(tmp_path))
    assert sentence in text
    assert "Traceback" not in text and "File " not in text and "Errno" not in text and "--->" not in text
    assert type(ended_with) is error


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        (lambda folder: checksums.hash_file(folder / "none"), FileNotFoundError),  # by open, not by a check
        (lambda folder: checksums.hash_files(folder, ["a\0b"]), ValueError),  # by open, in a thread
        (lambda folder: json.loads("{"), json.JSONDecodeError),  # a library's ValueError
        (lambda folder: checksums.hash_files(folder, None), TypeError),
        (lambda folder: [][1], IndexError),
        (lambda folder: (_ for _ in ()).throw(ValueError("the user's own")), ValueError),
    ],
)
def test_a_fault_keeps_its_traceback(shell, tmp_path, failing, error):
    text, ended_with = shown(shell, "failing()", failing=lambda: failing(tmp_path))
    assert "Traceback" in text and error.__name__ in text
    assert type(ended_with) is error


def test_colabs_own_classes_of_errors_are_shown_as_sentences_too(shell, on_colab):
    (on_colab / "visits").write_text("0")
    text, ended_with = shown(shell, "from llm_finetuning import colab; colab.mount_drive()")
    assert text.startswith("Drive was not mounted (MessageError: Error: credential propagation was unsuccessful).")
    assert len(text.splitlines()) == 1 and type(ended_with) is ConnectionError
