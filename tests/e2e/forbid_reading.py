"""`python forbid_reading.py PROGRAM ...` runs a program that may not read other processes' memory.

As in a container: a seccomp filter has `process_vm_readv` and `process_vm_writev` fail with EPERM.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

AUDIT_ARCH, READV, WRITEV = {"x86_64": (0xC000003E, 310, 311), "aarch64": (0xC00000B7, 270, 271)}[os.uname().machine]
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000 | errno.EPERM
FILTER = [
    (LOAD, 0, 0, 4),  # the machine
    (JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH),
    (RETURN, 0, 0, ALLOW),
    (LOAD, 0, 0, 0),  # the call's number
    (JUMP_IF_EQUAL, 1, 0, READV),
    (JUMP_IF_EQUAL, 0, 1, WRITEV),
    (RETURN, 0, 0, FAIL),
    (RETURN, 0, 0, ALLOW),
]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def main() -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in FILTER))
    program = Program(len(FILTER), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0):
        sys.exit(f"no seccomp filter: {os.strerror(ctypes.get_errno())}")
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
