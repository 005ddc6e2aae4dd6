"""External routers between the requests and the engines: sglang-router and vllm-router."""
