"""The bridge to vLLM: the only package that imports vllm and torch."""
