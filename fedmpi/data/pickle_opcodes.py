"""The opcodes that a pickle of flat data may have, the size of their arguments, and what they push."""

from __future__ import annotations

import pickletools

ATOM, OBJECT, TUPLE, LIST, ARGUMENTS, DICT, UNSET = range(7)
"""Kinds: number or text; constructor or its result; tuple of such; list of such; tuple of tuples; dict; no entry."""

KIND_NAMES = ("an atom", "an object", "a tuple", "a list", "a tuple of tuples", "a dict", "nothing")
OPCODE_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
CODES = {name: code for code, name in OPCODE_NAMES.items()}


def codes_of(names: str) -> list[int]:
    """The codes of opcodes, by their names in `pickletools`."""
    return [CODES[name] for name in names.split()]


LINE = -9
ARGUMENT_BYTES: dict[int, int] = {
    **dict.fromkeys(
        codes_of(
            "NONE NEWTRUE NEWFALSE MARK STOP EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
            "EMPTY_DICT DICT SETITEM SETITEMS MEMOIZE STACK_GLOBAL REDUCE BUILD"
        ), 0,
    ),
    **dict.fromkeys(codes_of("PROTO BININT1 BINGET BINPUT"), 1),
    **dict.fromkeys(codes_of("BININT2"), 2),
    **dict.fromkeys(codes_of("BININT LONG_BINGET LONG_BINPUT"), 4),
    **dict.fromkeys(codes_of("BINFLOAT"), 8),
    **dict.fromkeys(codes_of("LONG1 SHORT_BINBYTES SHORT_BINSTRING SHORT_BINUNICODE"), -1),
    **dict.fromkeys(codes_of("BINBYTES BINSTRING BINUNICODE"), -4),
    **dict.fromkeys(codes_of("BINBYTES8 BYTEARRAY8 BINUNICODE8 FRAME"), -8),
    **dict.fromkeys(codes_of("INT LONG STRING UNICODE GLOBAL GET PUT"), LINE),
}  # fmt: skip
"""Opcode -> bytes of its argument; -n: n bytes say how many follow; LINE: text to the end of the line."""

PUSHED = {
    **dict.fromkeys(
        codes_of(
            "NONE NEWTRUE NEWFALSE BINFLOAT INT LONG LONG1 STRING UNICODE SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 "
            "SHORT_BINSTRING BINSTRING SHORT_BINUNICODE BINUNICODE BINUNICODE8"
        ), ATOM,
    ),
    CODES["GLOBAL"]: OBJECT, CODES["EMPTY_TUPLE"]: TUPLE, CODES["EMPTY_LIST"]: LIST, CODES["EMPTY_DICT"]: DICT,
}  # fmt: skip
