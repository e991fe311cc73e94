"""The first pass over a pickle of unknown origin: it is judged before anything is built.

The pass follows the kinds of the objects on the unpickler's stack, one byte per object, and refuses all that flat data
do not need: other opcodes, containers inside containers, a container that is used twice (nested tuples that share parts
take exponential time to hash or print), integers of more than 20 digits, lengths and memo indices beyond the file. What
passes costs the standard unpickler time and memory in proportion to the file, and no deep stack.

`pickletools` names the opcodes; its `genops` would need half a minute for a split over a million clients.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fedmpi.data.pickle_opcodes import (
    ARGUMENT_BYTES,
    ARGUMENTS,
    ATOM,
    CODES,
    DICT,
    KIND_NAMES,
    LINE,
    LIST,
    OBJECT,
    OPCODE_NAMES,
    PUSHED,
    TUPLE,
    UNSET,
    codes_of,
)

MAX_MARKS = 16

_NUMBERS = frozenset(codes_of("INT LONG GET PUT"))
_NUMBER = re.compile(rb"-?\d{1,20}L?\n")
_INTEGERS = {
    CODES[name]: (re.compile(pattern, re.DOTALL), size)
    for name, pattern, size in (
        ("BININT1", b"(?:K.){1,999}", 2),
        ("BININT2", b"(?:M..){1,999}", 3),
        ("BININT", b"(?:J....){1,999}", 5),
    )
}
_REPLACED = {
    CODES["EMPTY_DICT"]: bytes(codes_of("EMPTY_LIST")),
    CODES["DICT"]: bytes(codes_of("LIST")),
    CODES["SETITEMS"]: bytes(codes_of("APPENDS")),
    CODES["SETITEM"]: bytes(codes_of("TUPLE2 APPEND")),
    CODES["FRAME"]: b"",  # whose length would be another
}
_PROTO, _FRAME, _GLOBAL, _LONG1, _STOP, _BUILD = codes_of("PROTO FRAME GLOBAL LONG1 STOP BUILD")

_KEY, _REFERENCE = rb"(?:K.|M..|J....)", rb"(h.|j....)"
_CLIENT = (
    _KEY
    + rb"%b%bK\x00\x85\x94%b\x87\x94R\x94\(K\x01"
    + _KEY
    + rb"\x85\x94%b[\x88\x89](?:C(?P<short>.)|B(?P<long>....))"
)
"""What protocol 4 writes for one client, up to the bytes of its array: a million of them are one match each."""
_ANY_CLIENT = re.compile(_CLIENT % ((_REFERENCE,) * 4), re.DOTALL)
_CLIENT_END = b"\x94t\x94b"
_CLIENT_STACK = bytes([ATOM, OBJECT])
_CLIENT_MEMO = bytes([TUPLE, ARGUMENTS, OBJECT, TUPLE, ATOM, ARGUMENTS])


class RefusedError(Exception):
    """The pickle is damaged or asks for more than data; the text says what."""


def flat_pickle(data: bytes) -> tuple[bytes, bool]:
    """The pickle of the same data with a list of keys and values in the place of a dict, and whether there was one.

    To set chosen integers in a dict takes time with the square of their number: the caller looks at the keys first.

    Raises:
        RefusedError: it is damaged or holds more than flat data; names the opcode and its place.
    """
    scan = _Scan(data)
    scan.run()
    flat, place = bytearray(), 0
    for start, stop, instead in scan.edits:
        flat += data[place:start] + instead
        place = stop
    flat += data[place:]
    return bytes(flat), scan.stack[0] == DICT


class _Scan:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.start = 0  # of the current opcode
        self.end = 0
        self.stack = bytearray()  # kinds
        self.marks: list[int] = []  # heights of the stack
        self.memo = bytearray()  # kinds
        self.edits: list[tuple[int, int, bytes]] = []  # from where, to where, what comes there instead
        self.has_puts = False  # entries of the memo are numbered: protocols 0 to 3
        self.client: re.Pattern[bytes] | None = None  # `_CLIENT` with this file's references

    def run(self) -> None:
        data, stack = self.data, self.stack
        while True:
            self.start = self.end
            if self.start >= len(data):
                raise RefusedError("it is cut short")
            opcode = data[self.start]
            if opcode in _INTEGERS:
                self._push_integers(*_INTEGERS[opcode])
                continue
            if opcode not in ARGUMENT_BYTES:
                raise RefusedError(f"it is no pickle of plain data ({self._place(opcode)})")
            self._skip_argument(opcode)
            if opcode in _REPLACED:
                self.edits.append((self.start, self.end, _REPLACED[opcode]))
            if opcode in PUSHED:
                stack.append(PUSHED[opcode])
            elif opcode in _EFFECTS:
                _EFFECTS[opcode](self)
                if opcode == _BUILD:
                    self._skip_clients()
            elif opcode == _STOP:
                break
        if len(stack) != 1 or self.marks:
            raise self._error("comes too early")

    def _place(self, opcode: int) -> str:
        return f"{OPCODE_NAMES.get(opcode, f'byte {opcode:#x}')} at byte {self.start}"

    def _error(self, problem: str) -> RefusedError:
        return RefusedError(f"it is no pickle of plain data ({self._place(self.data[self.start])} {problem})")

    def _push_integers(self, run: re.Pattern[bytes], size: int) -> None:
        found = run.match(self.data, self.start)
        if found is None:
            raise RefusedError("it is cut short")
        self.end = found.end()
        self.stack += bytes((self.end - self.start) // size)  # zeros: atoms

    def _skip_argument(self, opcode: int) -> None:
        data, size, body = self.data, ARGUMENT_BYTES[opcode], self.start + 1
        if size >= 0:
            self.end = body + size
        elif size == LINE:
            self.end = data.find(b"\n", body) + 1
            if self.end and opcode == _GLOBAL:
                self.end = data.find(b"\n", self.end) + 1
            if self.end == 0:
                raise RefusedError("it is cut short")
            if opcode in _NUMBERS and not _NUMBER.fullmatch(data, body, self.end):
                raise self._error("is no number of up to 20 digits")
        else:
            length = int.from_bytes(data[body : body - size], "little")
            self.end = body - size + (0 if opcode == _FRAME else length)
            if body - size + length > len(data):
                raise self._error(f"has {length} bytes, more than are left")
            if opcode == _LONG1 and length > 9:
                raise self._error("is no number of up to 20 digits")
        if self.end > len(data):
            raise RefusedError("it is cut short")
        if opcode == _PROTO and data[body] > 5:
            raise self._error(f"says {data[body]}, the last one known is 5")

    def _top(self, count: int) -> bytearray:
        """The last `count` kinds; they stay."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise self._error("finds too little before it")
        return self.stack[len(self.stack) - count :]

    def _pop(self, count: int) -> bytearray:
        items = self._top(count)
        del self.stack[len(self.stack) - count :]
        return items

    def _pop_mark(self) -> bytearray:
        if not self.marks:
            raise self._error("has no mark before it")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def _mark(self) -> None:
        if len(self.marks) == MAX_MARKS:
            raise self._error("nests too deep")
        self.marks.append(len(self.stack))

    def _make_tuple(self, items: bytearray) -> None:
        deepest = max(items, default=ATOM)
        if deepest > TUPLE:
            raise self._error(f"puts {KIND_NAMES[deepest]} into a tuple")
        self.stack.append(ARGUMENTS if deepest == TUPLE else TUPLE)

    def _append(self, items: bytearray) -> None:
        (target,) = self._top(1)
        deepest = max(items, default=ATOM)
        if target != LIST or deepest > OBJECT:
            raise self._error(f"puts {KIND_NAMES[deepest]} into {KIND_NAMES[target]}")

    def _make_list(self) -> None:
        items = self._pop_mark()
        self.stack.append(LIST)
        self._append(items)

    def _set(self, items: bytearray) -> None:
        (target,) = self._top(1)
        keys, values = max(items[::2], default=ATOM), max(items[1::2], default=ATOM)
        if target != DICT or len(items) % 2 or keys > OBJECT or values > LIST:
            raise self._error(f"puts {KIND_NAMES[values]} under {KIND_NAMES[keys]} into {KIND_NAMES[target]}")

    def _make_dict(self) -> None:
        items = self._pop_mark()
        self.stack.append(DICT)
        self._set(items)

    def _stack_global(self) -> None:
        if max(self._pop(2)) != ATOM:
            raise self._error("names no class")
        self.stack.append(OBJECT)

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if function != OBJECT or arguments not in (TUPLE, ARGUMENTS):
            raise self._error(f"calls {KIND_NAMES[function]} with {KIND_NAMES[arguments]}")
        self.stack.append(OBJECT)

    def _build(self) -> None:
        target, state = self._top(2)
        if target != OBJECT or state not in (TUPLE, ARGUMENTS):
            raise self._error(f"gives {KIND_NAMES[state]} to {KIND_NAMES[target]}")
        self.stack.pop()

    def _memo_index(self) -> int:
        text = self.data[self.start + 1 : self.end]
        index = int(text.rstrip(b"L\n")) if self.data[self.start] in _NUMBERS else int.from_bytes(text, "little")
        if not 0 <= index < self.start:  # what an index stands for took a byte at least
            raise self._error(f"has index {index}, which is beyond the file")
        return index

    def _put(self) -> None:
        index = self._memo_index()
        self.memo += bytes([UNSET]) * (index + 1 - len(self.memo))
        self.memo[index] = self._top(1)[0]
        self.has_puts = True

    def _memoize(self) -> None:
        if self.has_puts:
            raise self._error("comes after numbered ones")
        self.memo += self._top(1)

    def _get(self) -> None:
        self.stack.append(self._remembered(self._memo_index()))

    def _remembered(self, index: int) -> int:
        kind = self.memo[index] if index < len(self.memo) else UNSET
        if kind > OBJECT:
            raise self._error(f"uses {KIND_NAMES[kind]} once more")
        return kind

    def _skip_clients(self) -> None:
        """Go on over clients as `_CLIENT` describes them."""
        if self.client is None and not self.has_puts and (found := _ANY_CLIENT.match(self.data, self.end)):
            references = found.groups()[:4]
            kinds = [self._remembered(int.from_bytes(reference[1:], "little")) for reference in references]
            if kinds[0] == OBJECT:
                self.client = re.compile(_CLIENT % tuple(map(re.escape, references)), re.DOTALL)
        if self.client is None or self.has_puts:
            return
        count, match, data = 0, self.client.match, self.data
        while found := match(data, self.end):
            short, long = found["short"], found["long"]
            end = found.end() + (short[0] if short else int.from_bytes(long, "little"))
            if not data.startswith(_CLIENT_END, end):
                break
            self.end = end + len(_CLIENT_END)
            count += 1
        self.stack += _CLIENT_STACK * count
        self.memo += _CLIENT_MEMO * count


_EFFECTS: dict[int, Callable[[_Scan], None]] = {
    CODES["MARK"]: _Scan._mark,
    CODES["TUPLE"]: lambda scan: scan._make_tuple(scan._pop_mark()),
    CODES["TUPLE1"]: lambda scan: scan._make_tuple(scan._pop(1)),
    CODES["TUPLE2"]: lambda scan: scan._make_tuple(scan._pop(2)),
    CODES["TUPLE3"]: lambda scan: scan._make_tuple(scan._pop(3)),
    CODES["LIST"]: _Scan._make_list,
    CODES["APPEND"]: lambda scan: scan._append(scan._pop(1)),
    CODES["APPENDS"]: lambda scan: scan._append(scan._pop_mark()),
    CODES["DICT"]: _Scan._make_dict,
    CODES["SETITEM"]: lambda scan: scan._set(scan._pop(2)),
    CODES["SETITEMS"]: lambda scan: scan._set(scan._pop_mark()),
    CODES["STACK_GLOBAL"]: _Scan._stack_global,
    CODES["REDUCE"]: _Scan._reduce,
    CODES["BUILD"]: _Scan._build,
    CODES["MEMOIZE"]: _Scan._memoize,
    **dict.fromkeys(codes_of("PUT BINPUT LONG_BINPUT"), _Scan._put),
    **dict.fromkeys(codes_of("GET BINGET LONG_BINGET"), _Scan._get),
}
