"""An MCP server with one tool. `python server.py` speaks over stdio, `python server.py 8000` over HTTP at /mcp."""

import sys
from fractions import Fraction

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("sums", log_level="CRITICAL")


@server.tool()
def calculator(expression: str) -> str:
    """Evaluates two numbers and an operator between them, such as 12 * 7."""
    try:
        left, operator, right = expression.split()
        a, b = Fraction(left), Fraction(right)
    except ValueError as error:
        raise ToolError("write two numbers with an operator between them, and spaces around it") from error
    match operator:
        case "+":
            return str(a + b)
        case "-":
            return str(a - b)
        case "*":
            return str(a * b)
        case "/" if b:
            return str(a / b)
    raise ToolError(f"{operator} is no operator; there are + - * /")  # the model reads this


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
