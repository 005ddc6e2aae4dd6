"""Routers of others, sglang-router and vllm-router, between the requests and the engines."""
