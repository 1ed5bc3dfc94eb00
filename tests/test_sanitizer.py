"""The sanitizer build sees what it is there for: planted errors end the process with a report.

Runs under `make sanitize-cpu`, which loads the runtimes; each case is a process of its own.
"""

import ctypes
import os
import subprocess
import sys

import pytest

from merge_attn_states._library import OP_LIBRARY

SANITIZING = "MERGE_ATTN_STATES_SANITIZE" in os.environ
pytestmark = pytest.mark.skipif(not SANITIZING, reason="not the sanitizer build")

START = """
import ctypes
import merge_attn_states
from merge_attn_states._library import OP_LIBRARY
library = ctypes.CDLL(str(OP_LIBRARY))
malloc = ctypes.CDLL(None).malloc
malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
"""

# The C entry on D = 16 with exact allocations; `missing` elements of the prefix are not there. The
# structs end before their optional fields, so where the memory ends is not told, and only the
# sanitizer can see the kernel read past it.
MERGE = """
class Tensor(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("data", ctypes.c_void_p), ("sizes", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("rank", ctypes.c_int32), ("dtype", ctypes.c_uint32),
        ("device_type", ctypes.c_int32), ("device_index", ctypes.c_int32),
    ]

class Args(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), *((name, ctypes.POINTER(Tensor)) for name in (
            "output", "prefix_output", "prefix_lse", "suffix_output", "suffix_lse", "output_lse",
            "output_scale")),
        ("stream", ctypes.c_void_p),
    ]

def operand(*sizes, missing=0):
    count = 1
    for size in sizes:
        count *= size
    bytes = 4 * (count - missing)
    data = malloc(bytes)
    ctypes.memset(data, 0, bytes)
    keep = (ctypes.c_int64 * 3)(*sizes), (ctypes.c_int64 * 3)(16, 16, 1)
    tensor = Tensor(ctypes.sizeof(Tensor), data, *map(ctypes.addressof, keep), len(sizes),
                    2 | 32 << 8 | 1 << 16, 1, 0)
    tensor.keep = keep
    return ctypes.pointer(tensor)

args = Args(ctypes.sizeof(Args), output=operand(1, 1, 16), prefix_lse=operand(1, 1),
            prefix_output=operand(1, 1, 16, missing=missing), suffix_output=operand(1, 1, 16),
            suffix_lse=operand(1, 1))
message = ctypes.create_string_buffer(500)
status = library.merge_attn_states_merge(ctypes.byref(args), message, 500)
assert status == 0, message.value
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, check=False
    )


def test_this_is_the_sanitizer_build():
    assert hasattr(ctypes.CDLL(str(OP_LIBRARY)), "merge_attn_states_planted_overread")


OVERREAD = "library.merge_attn_states_planted_overread(ctypes.c_void_p(malloc(40)), {})"
OVERFLOW = "library.merge_attn_states_planted_overflow(ctypes.c_int64(2**63 - {}))"
KERNEL = "missing = {}" + MERGE.replace("{", "{{").replace("}", "}}")


@pytest.mark.parametrize(
    ("code", "legal", "wrong", "report"),
    [
        pytest.param(OVERREAD, 9, 10, "READ of size 4", id="planted overread"),
        pytest.param(OVERFLOW, 2, 1, "signed integer overflow", id="planted overflow"),
        pytest.param(KERNEL, 0, 1, "READ of size", id="kernel given a short operand"),
    ],
)
def test_errors_are_seen(code, legal, wrong, report):
    fine = run(code.format(legal))
    assert fine.returncode == 0, fine.stderr
    seen = run(code.format(wrong))
    assert seen.returncode != 0
    assert report in seen.stderr
