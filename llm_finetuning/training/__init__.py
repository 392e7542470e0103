"""From pairs to a trained adapter: examples, QLoRA, plan, self-check, trainer, checkpoints."""
