"""The first pass over a pickle of unknown origin: it is judged before anything is built.

The pass follows the kinds of the objects on the unpickler's stack, one byte per object, and refuses all that flat data
do not need: other opcodes, containers inside containers, a container that is used twice (nested tuples that share parts
take exponential time to hash or print), integers of more than 20 digits, lengths and memo indices beyond the file. What
passes costs the standard unpickler time and memory in proportion to the file, and no deep stack.

`pickletools` names the opcodes; its `genops` would need half a minute for a split over a million clients.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable

MAX_MARKS = 16

_ATOM, _OBJECT, _TUPLE, _LIST, _ARGUMENTS, _DICT, _UNSET = range(7)
"""Kinds: number or text; constructor or its result; tuple of such; list of such; tuple of tuples; dict; no entry."""
_KIND_NAMES = ("an atom", "an object", "a tuple", "a list", "a tuple of tuples", "a dict", "nothing")

_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
_CODES = {name: code for code, name in _NAMES.items()}
_ARGUMENT_BYTES = {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4, pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}  # fmt: skip


def _codes(names: str) -> list[int]:
    return [_CODES[name] for name in names.split()]


_PUSHED = {
    **dict.fromkeys(
        _codes(
            "NONE NEWTRUE NEWFALSE BININT1 BININT2 BININT BINFLOAT INT LONG LONG1 STRING UNICODE SHORT_BINBYTES "
            "BINBYTES BINBYTES8 BYTEARRAY8 SHORT_BINSTRING BINSTRING SHORT_BINUNICODE BINUNICODE BINUNICODE8"
        ), _ATOM,
    ),
    _CODES["GLOBAL"]: _OBJECT, _CODES["EMPTY_TUPLE"]: _TUPLE, _CODES["EMPTY_LIST"]: _LIST, _CODES["EMPTY_DICT"]: _DICT,
}  # fmt: skip
_NUMBERS = frozenset(_codes("INT LONG GET PUT"))
_NUMBER = re.compile(rb"-?\d{1,20}L?\n")
_REPLACED = {
    _CODES["EMPTY_DICT"]: bytes(_codes("EMPTY_LIST")),
    _CODES["DICT"]: bytes(_codes("LIST")),
    _CODES["SETITEMS"]: bytes(_codes("APPENDS")),
    _CODES["SETITEM"]: bytes(_codes("TUPLE2 APPEND")),
    _CODES["FRAME"]: b"",  # whose length would be another
}
_PROTO, _FRAME, _GLOBAL, _LONG1, _STOP = _codes("PROTO FRAME GLOBAL LONG1 STOP")

_KEY, _REFERENCE = rb"(?:K.|M..|J....)", rb"(h.|j....)"
_CLIENT = (
    _KEY + rb"%b%bK\x00\x85\x94%b\x87\x94R\x94\(K\x01" + _KEY + rb"\x85\x94%b[\x88\x89]"
    rb"(?:C(?P<short>.)|B(?P<long>....))"
)
"""The spelling of one client in protocol 4, up to the bytes of its array: a million clients are a million matches."""
_ANY_CLIENT = re.compile(_CLIENT % ((_REFERENCE,) * 4), re.DOTALL)
_CLIENT_END = b"\x94t\x94b"
_CLIENT_STACK = bytes([_ATOM, _OBJECT])
_CLIENT_MEMO = bytes([_TUPLE, _ARGUMENTS, _OBJECT, _TUPLE, _ATOM, _ARGUMENTS])


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
    return bytes(scan.flat), scan.stack[0] == _DICT


class _Scan:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.start = self.end = 0  # of the current opcode
        self.stack = bytearray()  # kinds
        self.marks: list[int] = []  # heights of the stack
        self.memo = bytearray()  # kinds
        self.flat, self.num_copied = bytearray(), 0  # the pickle without dicts, and how many bytes it stands for
        self.has_puts = False  # entries of the memo are numbered: protocols 0 to 3
        self.client: re.Pattern[bytes] | None = None  # `_CLIENT` with this file's references

    def run(self) -> None:
        data, opcode = self.data, -1
        while opcode != _STOP:
            self.start = self.end
            if self.start >= len(data):
                raise RefusedError("it is cut short")
            opcode = data[self.start]
            if opcode not in _PUSHED and opcode not in _EFFECTS:
                raise RefusedError(f"it is no pickle of plain data ({self._place()})")
            self._skip_argument(opcode)
            if opcode in _REPLACED:
                self.flat += data[self.num_copied : self.start] + _REPLACED[opcode]
                self.num_copied = self.end
            if opcode in _PUSHED:
                self.stack.append(_PUSHED[opcode])
            else:
                _EFFECTS[opcode](self)
        if len(self.stack) != 1 or self.marks:
            raise self._error("comes too early")
        self.flat += data[self.num_copied :]

    def _place(self) -> str:
        opcode = self.data[self.start]
        return f"{_NAMES.get(opcode, f'byte {opcode:#x}')} at byte {self.start}"

    def _error(self, problem: str, *kinds: int) -> RefusedError:
        problem = problem.format(*(_KIND_NAMES[kind] for kind in kinds))
        return RefusedError(f"it is no pickle of plain data ({self._place()} {problem})")

    def _skip_argument(self, opcode: int) -> None:
        data, size, start = self.data, _ARGUMENT_BYTES[opcode], self.start + 1
        self.end = start + size
        if size in _LENGTH_BYTES or opcode == _FRAME:
            body = start + _LENGTH_BYTES.get(size, size)
            length = int.from_bytes(data[start:body], "little")
            self.end = body if opcode == _FRAME else body + length
            if body + length > len(data):
                raise self._error(f"has {length} bytes, more than are left")
            if opcode == _LONG1 and length > 9:
                raise self._error("is no number of up to 20 digits")
        elif size == pickletools.UP_TO_NEWLINE:
            self.end = data.find(b"\n", start) + 1
            if self.end and opcode == _GLOBAL:
                self.end = data.find(b"\n", self.end) + 1
            if self.end and opcode in _NUMBERS and not _NUMBER.fullmatch(data, start, self.end):
                raise self._error("is no number of up to 20 digits")
        if not 0 < self.end <= len(data):
            raise RefusedError("it is cut short")
        if opcode == _PROTO and data[start] > 5:
            raise self._error(f"says {data[start]}, the last one known is 5")

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

    def _tuple(self, items: bytearray) -> None:
        deepest = max(items, default=_ATOM)
        if deepest > _TUPLE:
            raise self._error("puts {} into a tuple", deepest)
        self.stack.append(_ARGUMENTS if deepest == _TUPLE else _TUPLE)

    def _append(self, items: bytearray) -> None:
        (target,), deepest = self._top(1), max(items, default=_ATOM)
        if target != _LIST or deepest > _OBJECT:
            raise self._error("puts {} into {}", deepest, target)

    def _set(self, items: bytearray) -> None:
        (target,), keys, values = self._top(1), max(items[::2], default=_ATOM), max(items[1::2], default=_ATOM)
        if target != _DICT or len(items) % 2 or keys > _OBJECT or values > _LIST:
            raise self._error("puts {} under {} into {}", values, keys, target)

    def _make(self, kind: int, fill: Callable[[bytearray], None]) -> None:
        items = self._pop_mark()
        self.stack.append(kind)
        fill(items)

    def _stack_global(self) -> None:
        if max(self._pop(2)) != _ATOM:
            raise self._error("names no class")
        self.stack.append(_OBJECT)

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if function != _OBJECT or arguments not in (_TUPLE, _ARGUMENTS):
            raise self._error("calls {} with {}", function, arguments)
        self.stack.append(_OBJECT)

    def _build(self) -> None:
        target, state = self._top(2)
        if target != _OBJECT or state not in (_TUPLE, _ARGUMENTS):
            raise self._error("gives {} to {}", state, target)
        self.stack.pop()
        self._skip_clients()

    def _memo_index(self) -> int:
        text = self.data[self.start + 1 : self.end]
        index = int(text.rstrip(b"L\n")) if self.data[self.start] in _NUMBERS else int.from_bytes(text, "little")
        if not 0 <= index < self.start:  # what an index stands for took a byte at least
            raise self._error(f"has index {index}, which is beyond the file")
        return index

    def _put(self) -> None:
        index = self._memo_index()
        self.memo += bytes([_UNSET]) * (index + 1 - len(self.memo))
        self.memo[index] = self._top(1)[0]
        self.has_puts = True

    def _memoize(self) -> None:
        if self.has_puts:
            raise self._error("comes after numbered ones")
        self.memo += self._top(1)

    def _remembered(self, index: int) -> int:
        kind = self.memo[index] if index < len(self.memo) else _UNSET
        if kind > _OBJECT:
            raise self._error("uses {} once more", kind)
        return kind

    def _skip_clients(self) -> None:
        """Go on over clients as `_CLIENT` describes them."""
        if self.client is None and not self.has_puts and (found := _ANY_CLIENT.match(self.data, self.end)):
            references = found.groups()[:4]
            kinds = [self._remembered(int.from_bytes(reference[1:], "little")) for reference in references]
            if kinds[0] == _OBJECT:
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


_EFFECTS: dict[int, Callable[[_Scan], object]] = {
    **dict.fromkeys(_codes("PROTO FRAME STOP"), lambda scan: None),
    _CODES["MARK"]: _Scan._mark,
    _CODES["TUPLE"]: lambda scan: scan._tuple(scan._pop_mark()),
    _CODES["TUPLE1"]: lambda scan: scan._tuple(scan._pop(1)),
    _CODES["TUPLE2"]: lambda scan: scan._tuple(scan._pop(2)),
    _CODES["TUPLE3"]: lambda scan: scan._tuple(scan._pop(3)),
    _CODES["LIST"]: lambda scan: scan._make(_LIST, scan._append),
    _CODES["APPEND"]: lambda scan: scan._append(scan._pop(1)),
    _CODES["APPENDS"]: lambda scan: scan._append(scan._pop_mark()),
    _CODES["DICT"]: lambda scan: scan._make(_DICT, scan._set),
    _CODES["SETITEM"]: lambda scan: scan._set(scan._pop(2)),
    _CODES["SETITEMS"]: lambda scan: scan._set(scan._pop_mark()),
    _CODES["STACK_GLOBAL"]: _Scan._stack_global,
    _CODES["REDUCE"]: _Scan._reduce,
    _CODES["BUILD"]: _Scan._build,
    _CODES["MEMOIZE"]: _Scan._memoize,
    **dict.fromkeys(_codes("PUT BINPUT LONG_BINPUT"), _Scan._put),
    **dict.fromkeys(
        _codes("GET BINGET LONG_BINGET"), lambda scan: scan.stack.append(scan._remembered(scan._memo_index()))
    ),
}
