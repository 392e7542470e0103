"""What the evaluations of a run cost: counted in tokens that the model computes, and told as a share of its time."""

from training_fixtures import prepare, small_settings

from llm_finetuning import settings
from llm_finetuning.evaluation import agreement, scoreboard
from llm_finetuning.training import callbacks, metrics
from llm_finetuning.training.resumable import train

A_PAIR = 370
"""Tokens of a pair of OASST1's English best replies, and of one side of a ranked pair (measured on 100 trees)."""
TRAINED = 2 * 180 * 16_384
"""Tokens of two epochs of them: an epoch has some 165 to 220 times 16,384."""


class Passes:
    """Counts the forward passes of a model's decoder in evaluation mode, and their tokens, padding included."""

    def __init__(self, model):
        self.count = self.tokens = 0
        model.get_base_model().model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, decoder, given, named) -> None:
        if not decoder.training:
            self.count += 1
            self.tokens += (given[0] if given else named["input_ids"]).numel()

    def taken(self) -> tuple[int, int]:
        """(forward passes, tokens) since the last time."""
        taken, self.count, self.tokens = (self.count, self.tokens), 0, 0
        return taken


def test_an_evaluation_computes_the_held_out_set_once_and_answers_shortly(tiny_base, tmp_path):
    run = prepare(small_settings(tmp_path, tiny_base, eval_steps=2, max_steps=4, max_new_tokens=96))
    passes, held_out = Passes(run.model), run.held_out
    train(run.trainer)
    count, tokens = passes.taken()
    longest = max(len(example["input_ids"]) for example in held_out)
    answers = callbacks.SAMPLES * (longest + callbacks.SAMPLE_TOKENS)
    evaluations = 3  # at steps 0, 2 and 4
    assert count <= evaluations * (1 + 1 + callbacks.SAMPLE_TOKENS)
    least = sum(len(example["input_ids"]) for example in held_out)
    assert evaluations * least < tokens <= evaluations * (len(held_out) * longest + answers)
    entries = metrics.Metrics(run.settings.folders.metrics).read()
    assert sum("evaluation_seconds" in entry for entry in entries) == evaluations

    board = scoreboard.after(run.model, held_out, run.template, run.settings)
    count, tokens = passes.taken()
    answered = run.settings.eval_answers * (longest + run.settings.max_new_tokens)
    assert least < tokens <= len(held_out) * longest + answered
    assert "after " in metrics.evaluation_share(board, entries) and board["after"]["seconds"] > 0


def test_with_the_defaults_evaluating_is_a_small_part_of_the_work():
    """A token is evaluated by half the operations that it is trained by: a forward pass, of two that cost the same."""
    default = settings.Finetuning()
    steps = TRAINED // default.tokens_per_step
    answer = A_PAIR + default.max_new_tokens
    board = A_PAIR * (default.eval_pairs + 2 * max(default.eval_pairs, agreement.FEWEST))
    board += answer * default.eval_answers
    watched = A_PAIR * default.eval_pairs + callbacks.SAMPLES * (A_PAIR + callbacks.SAMPLE_TOKENS)
    assert 3 * board / (2 * TRAINED) < 0.1, "before, after, merged"
    assert (steps // default.eval_steps + 1) * watched / (2 * TRAINED) < 0.1, "while training"


def test_the_share_is_said():
    board = {"before": {"seconds": 30.0}, "after": {"seconds": 20.0}, "merged": {"loss": 1.0}}
    trained = {"step": 1, "loss": 1.0, "tokens_per_second": 9.0, "seconds": 500.0}
    entries = [trained, trained, {"step": 1, "held_out_loss": 1.0, "evaluation_seconds": 10.0}]
    said = (
        "evaluation took 1 min 0 s, 6% of the training's 16 min 40 s (before 30 s, after 20 s, 1 while training 10 s)"
    )
    assert metrics.evaluation_share(board, entries) == said
    assert "%" not in metrics.evaluation_share(board, []), "nothing was trained in this run"
