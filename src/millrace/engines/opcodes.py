"""Write payloads that a Python server unpickles, opcode by opcode (protocol 3, see `pickletools`).

Nothing is pickled here, so the server's classes need not be importable.
"""

import struct
from dataclasses import dataclass

PROTOCOL = b"\x80\x03"
STOP = b"."


@dataclass(frozen=True, slots=True)
class Name:
    """A name that the reader imports."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the reader makes; its value is the result."""

    function: Name
    arguments: tuple[object, ...]


def encode(value: object) -> bytes:
    """Return the opcodes that push `value` on the reader's stack. Raises TypeError for an unsupported type."""
    match value:
        case str():
            data = value.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case dict() if not value:
            return b"}"
        case Name(module, name):
            return b"c" + module.encode() + b"\n" + name.encode() + b"\n"
        case Call(function, arguments):
            return encode(function) + encode(arguments) + b"R"
    raise TypeError(f"a payload can't hold a value of type {type(value).__name__}")
