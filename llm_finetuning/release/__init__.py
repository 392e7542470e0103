"""From a merge to the folder that people download: proof, model card, checksums, copying, the Hub, GGUF."""
