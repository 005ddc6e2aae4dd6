"""What the engine's own interpreter runs: vLLM's server, started as `vllm serve` starts it.

    python serve.py VLLM_ARGUMENT ...

It imports nothing of Millrace. The command `vllm` itself asks for the version of a distribution called vllm, which the
one for the CPU is not; and `python -m vllm.entrypoints.openai.api_server` knows neither several API servers nor nodes
without one. vLLM spawns its children from this file, and each runs the module level again.
"""

import gc
import os
import sys

# New objects between two looks of Python's garbage collector, whose own 700 cost a quarter of the time in which each of
# vLLM's processes is imported.
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
    # What opens /inference/v1/generate and the aborting of its requests.
    if "enable_scale_out" in arguments:
        arguments.enable_scale_out = True
    else:  # 0.23
        arguments.tokens_only = True
    validate_parsed_serve_args(arguments)
    ServeSubcommand.cmd(arguments)


# This file's folder is first on the path, and its modules would be found before others of their names.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]

if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # on the CPU, where a server that is started soon is what counts
    gc.set_threshold(GC_THRESHOLD)

if __name__ == "__main__":
    main()
