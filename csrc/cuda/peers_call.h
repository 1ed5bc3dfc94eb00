// What the kernels of a merge across ranks get, made of a RanksCall.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../core/ranks_call.h"
#include "../core/state.h"
#include "fast_division.h"

namespace merge_attn_states::cuda {

struct PeersCall {
  uint32_t num_rows, merged_heads, row_packs;
  uint32_t rows_a_block, num_blocks, chunk_threads;  // of lines, or chunks of rows
  uint32_t lines_a_row;
  FastDivision heads, packs;
  PerRow output, lse, empty, out, out_lse;
  const void *lengths, *starts;
  int64_t num_requests;
  bool has_64_bit_requests, declares_empty, nan_is_empty, scatters, is_aligned, out_is_aligned;
  LseRule rule;
  uint32_t rank, ranks;
  uint32_t num_tokens, kind;  // what ranks must agree about: tokens, base, where rows lie
  int64_t limit_ns;
  int64_t headers, lines, line_rows, rows, lses, flags, lse_lines, acks, max_rows;
  uint32_t buffer_heads;
  char *memory[kMaxPeers], *buffers[kMaxPeers];
  uint32_t *is_reported, *numbers;
  uint32_t num_numbers;
  int64_t* report;
};

enum class Way { kLines, kBulk, kReading };

// A kernel's launch.
struct PeersLaunch {
  PeersCall call;
  Way way;
  int64_t blocks;
  int64_t threads;
};

inline PeersLaunch peers_launch(const RanksCall& call, const PeerSizes& sizes) {
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  const int64_t size = size_of(call.dtype), row_bytes = call.head_size * size;
  const int64_t num_rows = call.num_tokens * call.merged_heads;
  const PeerLayout layout(sizes, call.ranks, call.max_rows, row_bytes);
  // All blocks wait, so all must be on the GPU at once, and those of another stream's object too:
  // of a multiprocessor each has the room of a block in bulk.
  const int64_t line_threads = std::max(sizes.line_threads, layout.row_packs());
  const int64_t line_blocks = PeerLayout::pieces(num_rows, layout.line_block_rows());
  const bool may_be_lines =
      num_rows <= layout.line_rows &&
      line_blocks * line_threads <= call.multiprocessors * sizes.chunk_threads;
  const Way way = call.is_in_buffer && layout.is_read(num_rows) ? Way::kReading
                  : may_be_lines                                ? Way::kLines
                                                                : Way::kBulk;
  const bool by_lines = way == Way::kLines;
  const int64_t rows_a_block = by_lines ? layout.line_block_rows() : layout.chunk_rows(num_rows);
  // Rows that each begin at 16 bytes.
  const auto is_aligned = [&](const PerRow& rows) {
    const auto fits = [&](int64_t stride) { return stride * size % 16 == 0; };
    return reinterpret_cast<intptr_t>(rows.data) % 16 == 0 && fits(rows.strides[0]) &&
           fits(rows.strides[1]);
  };
  PeersCall made{.num_rows = u32(num_rows),
                 .merged_heads = u32(call.merged_heads),
                 .row_packs = u32(layout.row_packs()),
                 .rows_a_block = u32(rows_a_block),
                 .num_blocks = u32(PeerLayout::pieces(num_rows, rows_a_block)),
                 .chunk_threads = u32(sizes.chunk_threads),
                 .lines_a_row = u32(layout.lines_a_row()),
                 .heads = FastDivision(u32(call.merged_heads)),
                 .packs = FastDivision(u32(layout.row_packs())),
                 .output = call.output,
                 .lse = call.lse,
                 .empty = call.empty,
                 .out = call.out,
                 .out_lse = call.out_lse,
                 .lengths = call.lengths,
                 .starts = call.starts,
                 .num_requests = call.num_requests,
                 .has_64_bit_requests = call.has_64_bit_requests,
                 .declares_empty = call.empty.data != nullptr || call.starts != nullptr,
                 .nan_is_empty = call.nan_is_empty,
                 .scatters = call.scatters,
                 .is_aligned = is_aligned(call.output),
                 .out_is_aligned = is_aligned(call.out),
                 .rule = {call.base, call.base, call.ranks == 2 && call.base == Base::kE},
                 .rank = u32(call.rank),
                 .ranks = u32(call.ranks),
                 .num_tokens = u32(call.num_tokens),
                 .kind = u32(call.base == Base::kTwo) | u32(call.is_in_buffer) << 1,
                 .limit_ns = call.limit_ns,
                 .headers = layout.headers(),
                 .lines = layout.lines(),
                 .line_rows = layout.line_rows,
                 .rows = layout.rows(),
                 .lses = layout.lses(),
                 .flags = layout.flags(),
                 .lse_lines = layout.lse_lines(),
                 .acks = layout.acks(),
                 .max_rows = call.max_rows,
                 .buffer_heads = u32(call.merged_heads * (call.scatters ? call.ranks : 1)),
                 .memory = {},
                 .buffers = {},
                 .is_reported = call.numbers,
                 .numbers = call.numbers + 1,
                 .num_numbers = u32(layout.numbers() - 1),
                 .report = call.report};
  std::copy_n(call.memory, call.ranks, made.memory);
  std::copy_n(call.buffers, call.ranks, made.buffers);
  if (by_lines) {
    return {made, way, line_blocks, line_threads};
  }
  const int64_t blocks = std::min({int64_t{made.num_blocks}, sizes.blocks, call.multiprocessors});
  return {made, way, blocks, sizes.chunk_threads};
}

}  // namespace merge_attn_states::cuda
