"""Start vLLM's server as `vllm serve` does. The engine's own interpreter runs this file.

    python serve.py VLLM_ARGUMENT ...

It imports nothing of Millrace. The command `vllm` itself needs a distribution named vllm, but the CPU build has another
name. `python -m vllm.entrypoints.openai.api_server` supports neither several API servers nor headless nodes. vLLM
spawns its child processes from this file, and each child runs the module level again.
"""

import gc
import os
import sys

# Allocations between two runs of Python's garbage collector. With the default of 700, the collector takes a quarter of
# the import time of each vLLM process.
GC_THRESHOLD = 50_000


def main() -> None:
    import vllm.logger  # type: ignore[import-not-found,unused-ignore]
    from vllm.entrypoints.cli.serve import (  # type: ignore[import-not-found,unused-ignore]
        ServeSubcommand,
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.entrypoints.serve.utils.api_utils import (  # type: ignore[import-not-found,unused-ignore]
        cli_env_setup,
    )
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found,unused-ignore]

    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args()
    if "configure_logging_from_args" in vars(vllm.logger):  # not in 0.23
        vllm.logger.configure_logging_from_args(arguments)
    # This opens /inference/v1/generate and the route that aborts its requests.
    if "enable_scale_out" in arguments:
        arguments.enable_scale_out = True
    else:  # 0.23
        arguments.tokens_only = True
    validate_parsed_serve_args(arguments)
    ServeSubcommand.cmd(arguments)


# Python puts this file's folder first on the path, where its modules would hide others of the same name.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]

if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # on the CPU, where fast startup matters most
    gc.set_threshold(GC_THRESHOLD)
    import torch

    # A process must ask the kernel before it uses AMX's tiles. vLLM's attention in bfloat16 uses them without asking,
    # and the process dies of an illegal instruction. Where there is no AMX, this does nothing.
    torch.cpu._init_amx()

if __name__ == "__main__":
    main()
