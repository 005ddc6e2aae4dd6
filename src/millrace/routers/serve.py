"""What the router's own interpreter runs: the router, started as its own launcher starts it.

    python serve.py sglang|vllm ROUTER_ARGUMENT ...

It imports nothing of Millrace. The key comes in the environment, as MILLRACE_ROUTER_API_KEY, and stays out of command
lines. vllm-router asks for none.
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


# This file's folder is first on the path, and its modules would be found before others of their names.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]

if __name__ == "__main__":
    main()
