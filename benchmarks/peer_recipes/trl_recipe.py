"""TRL: SFTTrainer with the settings of its notebook for SFT with QLoRA.

Source: huggingface/trl, examples/notebooks/sft_trl_lora_qlora.ipynb. Its remark "Change to bfloat16 if GPU has
support" is followed. Left out: use_liger_kernel, as Liger has no kernels for Phi; evaluation, logging to a service and
saving, which the other sides do not do either.
"""

import torch
import watch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

ADAPTER = {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"}
TRAINING = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 5,
    "num_train_epochs": 1,
    "learning_rate": 2e-4,
    "optim": "paged_adamw_8bit",
    "logging_steps": 1,
    "max_length": 1024,
    "activation_offloading": True,
    "gradient_checkpointing": True,
}
ON_A_CPU = {"optim": "adamw_torch", "activation_offloading": False, "use_cpu": True}


def main() -> None:
    job = watch.read_job()
    settings = watch.on_gpu(TRAINING, ON_A_CPU) | {"packing": job["packing"]}
    seen = watch.Watch(job, settings | ADAPTER)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["base"],
        attn_implementation="sdpa",
        dtype=torch.bfloat16,
        use_cache=True,
        quantization_config=quantized,
        trust_remote_code=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=job["work"], report_to="none", save_strategy="no", **settings),
        train_dataset=Dataset.from_json(job["rows"], cache_dir=job["work"]),
        peft_config=LoraConfig(**ADAPTER),
    )
    seen.attach(trainer)
    trainer.train()


if __name__ == "__main__":
    main()
