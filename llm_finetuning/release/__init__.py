"""From a merge to the folder that people download: verification, model card, checksums, copying, the Hub, GGUF."""
