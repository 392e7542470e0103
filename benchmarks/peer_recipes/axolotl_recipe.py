"""axolotl: its own training with the settings of its example for QLoRA with packing.

Source: axolotl-ai-cloud/axolotl, examples/llama-3/qlora-1b.yml. The rows come as its documentation's "Custom
Pre-Tokenized Dataset". Left out: loss_watchdog_threshold, which would end the training of a base with random weights,
and evaluation. Its LoRA kernels, which it switches on where nothing is said, refuse Phi's attention ("Original O code
not found" in 0.19.0), so they are off. FlashAttention is asked for where it is installed, else torch's FlexAttention,
which packs too (docs/attention.qmd); a CPU has neither, and no packing without them.
"""

import importlib.util
import json
from pathlib import Path

import watch
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train

SETTINGS = {
    "load_in_4bit": True,
    "adapter": "qlora",
    "sequence_len": 2048,
    "sample_packing": True,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 2,
    "num_epochs": 1,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": 2e-4,
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "val_set_size": 0,
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}
ON_A_CPU = {"optimizer": "adamw_torch", "attn_implementation": "sdpa", "sample_packing": False}


def main() -> None:
    job = watch.read_job()
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "flex_attention"
    settings = watch.on_gpu(SETTINGS | {"attn_implementation": attention}, ON_A_CPU)
    watch.Watch(job, settings).attach()
    work = Path(job["work"])
    folders = {
        "base_model": job["base"],
        "datasets": [{"path": job["rows"], "ds_type": "json"}],
        "dataset_prepared_path": str(work / "prepared"),
        "output_dir": str(work / "out"),
        "save_strategy": "no",
        "special_tokens": {"pad_token": "<|endoftext|>"},
    }
    config = work / "config.yml"
    config.write_text(json.dumps(settings | folders), encoding="utf-8")  # JSON is YAML
    do_train(load_cfg(str(config)), TrainerCliArgs())


if __name__ == "__main__":
    main()
