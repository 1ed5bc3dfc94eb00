"""Reads past the end of an allocation: what compute-sanitizer must report, under the same filter.

Through the C entry, where an operand's memory may be unknown; the operators refuse such a call.
"""

import ctypes

import torch

from merge_attn_states._library import OP_LIBRARY

CUDA, FLOAT32 = 2, 2 | 32 << 8 | 1 << 16


class Tensor(ctypes.Structure):
    """merge_attn_states_tensor of include/merge_attn_states.h without its optional fields."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
    )


class Args(ctypes.Structure):
    """merge_attn_states_args without its optional fields."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.POINTER(Tensor)) for name in "opPsSlc"),
        ("stream", ctypes.c_void_p),
    )


def view(tensor: torch.Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    """`tensor` as the C entry sees it, with strides of one's own."""
    array = ctypes.c_int64 * tensor.dim()
    sizes, strides = array(*tensor.shape), array(*(strides or tensor.stride()))
    size = ctypes.sizeof(Tensor)
    return Tensor(size, tensor.data_ptr(), sizes, strides, tensor.dim(), FLOAT32, CUDA, 0)


def main() -> None:
    rows = [torch.zeros(4, 2, 32, device="cuda") for _ in range(3)]
    lses = [torch.zeros(2, 4, device="cuda") for _ in range(2)]
    output, suffix = view(rows[0]), view(rows[2])
    prefix = view(rows[1], (2**14, 32, 1))  # tokens 64 KB apart in a tensor of 1 KB
    prefix_lse, suffix_lse = view(lses[0]), view(lses[1])
    operands = (output, prefix, prefix_lse, suffix, suffix_lse)
    args = Args(ctypes.sizeof(Args), *(ctypes.pointer(x) for x in operands), None, None, None)
    entry = ctypes.CDLL(str(OP_LIBRARY)).merge_attn_states_merge
    message = ctypes.create_string_buffer(1024)
    status = entry(ctypes.byref(args), message, ctypes.c_size_t(len(message)))
    assert status == 0, message.value.decode()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
