"""LLaMA-Factory: its own training with the settings of its example for QLoRA by bitsandbytes.

Source: hiyouga/LLaMA-Factory, examples/train_qlora/qwen3_lora_sft_otfq.yaml. The rows come as `tokenized_path`, the
form in which it keeps rows that it has tokenised itself. Template, dataset and cutoff_len are asked for, and have
nothing left to do there.
"""

from pathlib import Path

import watch
from datasets import Dataset
from llamafactory.train.tuner import run_exp

SETTINGS = {
    "quantization_bit": 4,
    "quantization_method": "bnb",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "template": "default",
    "dataset": "tokenized",
    "cutoff_len": 2048,
    "dataloader_num_workers": 4,
    "logging_steps": 10,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
}
ON_A_CPU = {"use_cpu": True}


def main() -> None:
    job = watch.read_job()
    settings = watch.on_gpu(SETTINGS, ON_A_CPU)
    watch.Watch(job, settings).attach()
    tokenized = Path(job["work"]) / "tokenized"
    Dataset.from_json(job["rows"], cache_dir=job["work"]).save_to_disk(tokenized)
    folders = {"model_name_or_path": job["base"], "tokenized_path": str(tokenized), "output_dir": job["work"]}
    run_exp(settings | folders | {"report_to": "none", "save_strategy": "no", "overwrite_output_dir": True})


if __name__ == "__main__":
    main()
