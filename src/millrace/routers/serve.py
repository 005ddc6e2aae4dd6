"""Starts a router in the router's own Python environment, through the router's own launcher.

    python serve.py sglang|vllm ROUTER_ARGUMENT ...

The script imports nothing of Millrace. It reads the key from MILLRACE_ROUTER_API_KEY, so that the key does not appear
in a command line. vllm-router has no key.
"""

import os
import sys


def main() -> None:
    if sys.argv[1] == "sglang":
        from sglang_router.launch_router import (  # type: ignore[import-not-found,unused-ignore]
            launch_router,
            parse_router_args,
        )

        arguments = parse_router_args(sys.argv[2:])
        arguments.api_key = os.environ["MILLRACE_ROUTER_API_KEY"]
    else:
        from vllm_router.launch_router import (  # type: ignore[import-not-found,unused-ignore]
            launch_router,
            parse_router_args,
        )

        arguments = parse_router_args(sys.argv[2:])
    launch_router(arguments)


# This file's folder is first on the path. Its modules would shadow others of the same name.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]

if __name__ == "__main__":
    main()
