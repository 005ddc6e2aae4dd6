"""What a server of Python will unpickle, written opcode by opcode: without pickling anything, and without the server's
classes. The format is that of `pickletools`, protocol 3."""

import struct
from dataclasses import dataclass

PROTOCOL = b"\x80\x03"
STOP = b"."


@dataclass(frozen=True, slots=True)
class Name:
    """Something that the reader imports."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What the reader gets by calling `function` with `arguments`."""

    function: Name
    arguments: tuple[object, ...]


def encode(value: object) -> bytes:
    """The opcodes that leave `value` on the reader's stack. Raises TypeError for what has no place in a payload."""
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
    raise TypeError(f"{type(value).__name__} has no place in a payload")
