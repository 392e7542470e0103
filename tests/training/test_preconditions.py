"""Names of other libraries are checked before anything is fetched or loaded."""

import dataclasses
import json

import pytest
from broken_bases import config, copy_of, pickled, renamed
from hub_stand_in import StandIn
from safetensors.torch import load_file
from training_fixtures import prepare, small_pairs, small_settings

from llm_finetuning import hardware, models
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.hardware import GIB
from llm_finetuning.release import merging, verify
from llm_finetuning.training import planning, preconditions, qlora
from llm_finetuning.training import resumable as training
from llm_finetuning.training.dataset import encode_inputs
from llm_finetuning.training.preconditions import check_names

TOKEN = "hf_" + "x" * 34


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type = 'cosin': did you mean 'cosine'"),
        ({"lr_scheduler_type": "zigzag"}, "lr_scheduler_type = 'zigzag': one of linear, cosine"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "'warmup_stable_decay' cannot be used here .*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "'cosine_with_min_lr' cannot be used here .*min_lr"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "needs a metric at each step"),
        ({"optim": "adamw_tourch"}, "optim = 'adamw_tourch': did you mean 'adamw_torch'"),
        ({"optim": "galore_adamw"}, "optim = 'galore_adamw' cannot be used here .*galore_torch.*set optim = 'auto'"),
        ({"report_to": "wandbb"}, "report_to = 'wandbb': did you mean 'wandb'"),
        ({"report_to": "neptune"}, "report_to = 'neptune': neptune is not installed"),
    ],
)
def test_what_other_libraries_do_not_know_is_named_with_its_cure(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_names(small_settings(tmp_path, "sample", **changed))


def test_what_they_know_passes(tmp_path):
    for changed in ({}, {"lr_scheduler_type": "polynomial"}, {"optim": "adafactor"}, {"report_to": "tensorboard"}):
        check_names(small_settings(tmp_path, "sample", **changed))


def test_all_are_said_at_once_and_before_the_base_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "locate", lambda *_: pytest.fail("the base was fetched"))
    chosen = small_settings(tmp_path, "sample", lr_scheduler_type="x", optim="y", report_to="z")
    with pytest.raises(ValueError, match="(?s)lr_scheduler_type = 'x'.*optim = 'y'.*report_to = 'z'"):
        planning.plan_run(chosen, inputs=None)


@pytest.fixture
def planned(monkeypatch):
    """Plans as the notebook does, and fails if the base is loaded."""
    monkeypatch.setattr(qlora, "load_base", lambda *_: pytest.fail("the base was loaded"))

    def plan(base, folder, pairs=None, tokenizer=None, **changed):
        chosen, pairs = small_settings(folder / "run", base, **changed), pairs or small_pairs()
        inputs = encode_inputs(chosen, tokenizer or models.tokenizer(str(base)), pairs, pairs)
        return planning.plan_run(chosen, inputs)

    return plan


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_a_base_that_is_quantised_already_is_refused(method, tiny_base, tmp_path, planned):
    base = copy_of(tiny_base, tmp_path / "base", config(quantization_config={"quant_method": method, "bits": 4}))
    with pytest.raises(ValueError, match=f"quantised already \\({method}\\).*Set model_name"):
        planned(base, tmp_path)


def test_a_base_with_pickled_weights_alone_is_refused(tiny_base, tmp_path, planned):
    base = copy_of(tiny_base, tmp_path / "base", pickled)
    with pytest.raises(FileNotFoundError, match="no weights as safetensors.*Pickled weights .* choose another base"):
        planned(base, tmp_path)


def test_a_base_of_which_a_shard_is_missing_is_refused(tiny_base, tmp_path, planned):
    base = copy_of(tiny_base, tmp_path / "base")
    names = load_file(base / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00002.safetensors"):
        planned(base, tmp_path)


def test_a_checkpoint_whose_layers_have_other_names_is_refused_by_name(tiny_base, tmp_path, planned):
    base = copy_of(tiny_base, tmp_path / "base", renamed(lambda name: name.replace("q_proj", "query")))
    with pytest.raises(ValueError, match="2 of 12 weights of linear layers .*model.layers.0.self_attn.q_proj.weight"):
        planned(base, tmp_path)


def test_a_checkpoint_without_the_prefix_of_its_model_trains_and_merges(tiny_base, tmp_path):
    """As AutoModel saves it; the merged folder keeps the names of its base."""
    base = copy_of(tiny_base, tmp_path / "base", renamed(lambda name: name.removeprefix("model.")))
    small = prepare(small_settings(tmp_path / "run", base, max_steps=2))
    training.train(small.trainer)
    training.save_adapter(small.trainer)
    after = scoreboard.held_out_loss(small.trainer.model, small.held_out, small.template)
    quantised = merging.quantised_names(small.trainer.model)
    assert verify.merge_and_verify(small.plan, quantised, small.template, small.held_out, after).checks.passed.all()


def test_a_tokenizer_of_another_model_is_refused(tiny_base, tmp_path, planned):
    base = copy_of(tiny_base, tmp_path / "base", config(vocab_size=300))
    with pytest.raises(ValueError, match="gives ids up to .* the model has 300 embeddings"):
        planned(base, tmp_path)


def test_examples_longer_than_the_models_positions_are_refused(tiny_base, tmp_path, planned):
    base = copy_of(tiny_base, tmp_path / "base", config(max_position_embeddings=32))
    with pytest.raises(ValueError, match="max_seq_length = 96: the longest example has .* set max_seq_length = 32"):
        planned(base, tmp_path)
    base = copy_of(tiny_base, tmp_path / "short", config(max_position_embeddings=96))
    with pytest.raises(ValueError, match="max_new_tokens = 90: .* has 96 positions"):
        planned(base, tmp_path, max_new_tokens=90)


def test_all_that_is_wrong_with_a_base_is_said_at_once(tiny_base, tmp_path, planned):
    wrong = {"quantization_config": {"quant_method": "awq"}, "vocab_size": 300, "max_position_embeddings": 32}
    with pytest.raises(ValueError, match="(?s)awq.*300 embeddings.*set max_seq_length = 32"):
        planned(copy_of(tiny_base, tmp_path / "base", config(**wrong)), tmp_path)


def test_hours_without_a_gpu_are_refused_before_the_base_is_fetched(tiny_base, tmp_path, planned, monkeypatch):
    slow = dataclasses.replace(hardware.detect(), device="cpu", flops=1e4)
    monkeypatch.setattr(hardware, "detect", lambda *_: slow)
    assert planned(tiny_base, tmp_path, allow_slow=True).seconds > 2 * 3600
    monkeypatch.setattr(models, "locate", lambda *_: pytest.fail("the base was fetched"))
    with pytest.raises(ValueError, match="no GPU here.*Change runtime type.*allow_slow = True"):
        planned(tiny_base, tmp_path)


@pytest.mark.parametrize(
    ("parameters", "gpu_memory", "host_memory", "message"),
    [
        (2.8e9, 15, 12.7, None),  # Phi-2 on a T4 of Colab
        (8e9, 15, 12.7, "T4, which has 15.0 GiB: take a smaller base"),
        (2.8e9, 15, 2, "this machine beside its GPU, which has 2.0 GiB: take a runtime with more memory"),
    ],
)
def test_a_merge_that_would_not_fit_is_refused(
    parameters, gpu_memory, host_memory, message, tiny_base, tmp_path, planned
):
    plan = planned(tiny_base, tmp_path)
    machine = dataclasses.replace(
        plan.machine, device="cuda:0", name="T4", free_memory=int(gpu_memory * GIB), host_memory=int(host_memory * GIB)
    )
    size = dataclasses.replace(plan.size, linear=int(parameters), other=0, vocabulary=51200)
    settings = dataclasses.replace(plan.settings, max_seq_length=512, tokens_per_step=512, micro_batch_tokens=0)
    plan = dataclasses.replace(plan, machine=machine, size=size, settings=settings)
    if message is None:
        return preconditions.check_machine(settings, plan)
    with pytest.raises(ValueError, match=message):
        preconditions.check_machine(settings, plan)


def account(role, *permissions, scope="me/model", **more):
    scoped = [{"entity": {"type": "model", "name": scope}, "permissions": list(permissions)}]
    token = {"role": role, "fineGrained": {"scoped": scoped, "global": []}}
    return {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": token}} | more


@pytest.mark.parametrize(
    ("who", "repository", "message"),
    [
        (account("write"), "me/model", None),
        (account("write"), "lab/model", None),
        (account("fineGrained", "repo.content.read", "repo.write"), "me/model", None),
        (account("fineGrained", "repo.write", scope="me"), "me/model", None),
        (account("read"), "me/model", "the token may only read. Make a token with write access"),
        (account("fineGrained", "repo.content.read"), "me/model", "the token may only read"),
        (account("fineGrained", "repo.write", scope="lab"), "me/model", "the token may only read"),
        (account("write"), "microsoft/phi-2", "the token is me's, who cannot write to microsoft"),
        ({}, "me/model", "the Hub does not accept the token"),
    ],
)
def test_a_token_that_may_not_write_is_named_before_anything_is_loaded(who, repository, message, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    chosen = small_settings(tmp_path, "sample", publish_to="hub", hub_repository=repository)
    with StandIn() as stand_in:
        stand_in.account = who
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        if message is None:
            return check_names(chosen)
        with pytest.raises(ValueError, match=message):
            check_names(chosen)


def test_no_token_and_no_network_are_named(tmp_path, monkeypatch):
    chosen = small_settings(tmp_path, "sample", publish_to="hub", hub_repository="me/model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="publish_to = 'hub'.*offline"):
        check_names(chosen)
    monkeypatch.setattr("llm_finetuning.colab.token", lambda: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="publish_to = 'hub'.*No token for the Hugging Face Hub"):
        check_names(chosen)


def test_a_tracker_that_would_ask_for_a_login_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preconditions, "get_available_reporting_integrations", lambda: ["wandb", "comet_ml"])
    for name in ("HOME", "WANDB_API_KEY", "WANDB_MODE", "COMET_API_KEY", "COMET_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, variable in (("wandb", "WANDB_API_KEY"), ("comet_ml", "COMET_API_KEY")):
        with pytest.raises(ValueError, match=f"{name} would ask for a login .* environment variable {variable}"):
            check_names(small_settings(tmp_path, "sample", report_to=name))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    check_names(small_settings(tmp_path, "sample", report_to="wandb"))
    monkeypatch.setenv("COMET_MODE", "OFFLINE")
    check_names(small_settings(tmp_path, "sample", report_to="comet_ml"))
