"""The weight loader that SGLang calls in its scheduler processes (`--custom-weight-loader millrace_sglang.load`).

The package imports nothing of Millrace and nothing of SGLang. It works with SGLang 0.5.15 and 0.5.23.

The first time that a bucket of some layout arrives, the model's own `load_weights` loads it while every copy into a
parameter is recorded (`recording`). The recorded copies are the plan of this layout. For later buckets of the same
layout the copies are made again, in few fused calls (`plan`). A model whose loader does more than copy is loaded by its
own `load_weights` each time.

A bucket is memory of the sender, or comes by a process group, ahead of the order to load it
(`millrace_receiving`).

After each bucket, the loader writes an answer for the sender: checksums of the tensors that arrived, whether the
parameters hold the same content, and which parameters have no content of this update yet (`loader`,
`answers`).

A sender with sharded tensors asks each rank which parts of the tensors it needs (`dry_run`), and sends only these
(`parts`).
"""

from .loader import load

__all__ = ["load"]
