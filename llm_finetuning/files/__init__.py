"""The one atomic writer, checksums, verified copies, and safetensors in shards."""
