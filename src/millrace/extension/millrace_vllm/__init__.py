"""The extension of vLLM's workers that loads new weights into a running server.

vLLM loads it with `--worker-extension-cls millrace_vllm.Extension` if the folder above is on PYTHONPATH. The package
imports nothing of Millrace. It works with vLLM 0.23.0 and 0.32.0.

A trainer's names differ from vLLM's: q_proj, k_proj and v_proj become one qkv_proj, and 128 experts become one tensor.
The extension lets the model's own `load_weights` run over a twin of the model, which has shapes but no memory, and
records where each tensor goes (`dry_run`, `plan`). So it refuses an unknown tensor or a wrong shape before it writes
anything, and it knows which parts of a module are missing. What a bucket of one layout does to the model is worked out
once (`layouts`), and each such bucket is loaded by the same few fused copies.

A module that uses its tensors as they were loaded is written in place. A module that vLLM processes after loading
(packed by oneDNN on the CPU, experts of some kernels, quantised) is staged until all of its parts have arrived. It then
goes through vLLM's layer-wise reload alone (`writing`). The model's own loader loads the tensors that it does more with
than copy. Between two calls every module has its memory, even after a failure.
"""

from .rpc import Extension

__all__ = ["Extension"]
