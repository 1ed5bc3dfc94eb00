"""Merges between kernels that are launched dependent and never wait, as JSON for the test.

    python chain.py neighbours.so NUM_TOKENS NUM_HEADS HEAD_SIZE

A call is dependent where MERGE_ATTN_STATES_PDL=1 is set. Prints how many calls in a stream and in a
graph were wrong, and how many of the graph's three kernels were launched dependent.
"""

import ctypes
import json
import sys

import torch

import merge_attn_states

CALLS = 100

library = ctypes.CDLL(sys.argv[1])
library.launch_produce.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64, ctypes.c_void_p]
library.launch_overwrite.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
library.count_dependent.argtypes = [ctypes.c_void_p]
tokens, heads, size = map(int, sys.argv[2:])

# The inputs lie in one buffer, so that one kernel writes them all.
rows, lses = tokens * heads * size, heads * tokens
memory = torch.empty(2 * rows * 2 + 2 * lses * 4, dtype=torch.uint8, device="cuda")
words = len(memory) // 4


def operands(buffer):
    parts, weights = buffer[: 4 * rows].view(torch.bfloat16), buffer[4 * rows :].view(torch.float32)
    prefix, suffix = parts.view(2, tokens, heads, size)
    prefix_lse, suffix_lse = weights.view(2, heads, tokens)
    return prefix, prefix_lse, suffix, suffix_lse


source = torch.empty_like(memory)
for operand in operands(source):
    operand.normal_()
output = torch.empty(tokens, heads, size, dtype=torch.bfloat16, device="cuda")
output_lse = torch.empty(heads, tokens, device="cuda")
expected, expected_lse = torch.empty_like(output), torch.empty_like(output_lse)
merge_attn_states.merge_attn_states(expected, *operands(source), expected_lse)


def succeed(status):
    assert status == 0, f"CUDA error {status}"


def chain():
    stream = torch.cuda.current_stream().cuda_stream
    succeed(library.launch_produce(memory.data_ptr(), source.data_ptr(), words, stream))
    merge_attn_states.merge_attn_states(output, *operands(memory), output_lse)
    succeed(library.launch_overwrite(memory.data_ptr(), words, stream))


def wrong(run):
    count = 0
    for _ in range(CALLS):
        memory.fill_(0xFF), output.zero_(), output_lse.zero_()
        torch.cuda.synchronize()
        run()
        torch.cuda.synchronize()
        same = torch.equal(output, expected) and torch.equal(output_lse, expected_lse)
        count += not same
    return count


in_stream = wrong(chain)
graph = torch.cuda.CUDAGraph(keep_graph=True)
with torch.cuda.graph(graph):
    chain()
graph.instantiate()
print(
    json.dumps(
        {
            "stream": in_stream,
            "graph": wrong(graph.replay),
            "dependent": library.count_dependent(graph.raw_cuda_graph()),
            "kernel": merge_attn_states.selected_kernel(output, *operands(memory)).kernel,
        }
    )
)
