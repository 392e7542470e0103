"""Unsloth: FastLanguageModel and TRL's SFTTrainer with the settings of its notebook for conversations with Phi-4.

Source: unslothai/notebooks, python_scripts/Phi_4-Conversational.py; with `packing` also its page "3x faster training
with packing". Its target modules are all linear layers of Phi-4; here all of Phi-2's, by their names. Rows that are
tokenised come as issue 7139 of unslothai/unsloth says. Unsloth patches transformers while it is imported, so it comes
first, and it needs a GPU for that.
"""

from unsloth import FastLanguageModel  # isort: skip
import watch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

ADAPTER = {
    "r": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "lora_alpha": 16,
    "lora_dropout": 0,
    "bias": "none",
    "use_gradient_checkpointing": "unsloth",
    "random_state": 3407,
}
TRAINING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 5,
    "num_train_epochs": 1,
    "learning_rate": 2e-4,
    "logging_steps": 1,
    "optim": "adamw_8bit",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "seed": 3407,
}
LENGTH = 2048


def main() -> None:
    job = watch.read_job()
    settings = TRAINING | {"packing": job["packing"]}
    seen = watch.Watch(job, settings | ADAPTER)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=job["base"], max_seq_length=LENGTH, load_in_4bit=True, trust_remote_code=False
    )
    model = FastLanguageModel.get_peft_model(model, **ADAPTER)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_json(job["rows"], cache_dir=job["work"]),
        args=SFTConfig(output_dir=job["work"], report_to="none", save_strategy="no", max_length=LENGTH, **settings),
    )
    seen.attach(trainer)  # only now: Unsloth rewrites the source of what it patches
    trainer.train()


if __name__ == "__main__":
    main()
