// A merge across ranks in one kernel, where each rank's GPU can write to the memory of all others:
// what a call is, and how that memory is used.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dtypes.h"
#include "lse_base.h"
#include "parts_call.h"

namespace merge_attn_states {

inline constexpr int kMaxPeers = 16;

// How rows are cut.
struct PeerSizes {
  int64_t line_threads;     // of a block that sends lines: 16 bytes of a row each
  int64_t most_line_bytes;  // of the rows that a peer gets as lines; more go in bulk
  int64_t chunk_threads;    // of a block in bulk, each with so many packs of 16 bytes at most
  int64_t chunk_packs;
  int64_t blocks;  // in bulk at most
  // Of the rows that a peer gets: between these they are read, where they lie in shared memory.
  int64_t least_read_bytes, most_read_bytes;
};

// The memory that every rank's peers write to, at the same offsets in each. Bytes; multiples of 16.
// What is sent in call n lies in half n % 2, since a rank is at most one call ahead of another.
struct PeerLayout {
  static constexpr int64_t kLine = 16;

  PeerSizes sizes;
  int64_t ranks, max_rows, row_bytes;
  int64_t line_rows;  // that may go as lines

  PeerLayout(const PeerSizes& sizes, int64_t ranks, int64_t max_rows, int64_t row_bytes)
      : sizes(sizes), ranks(ranks), max_rows(max_rows), row_bytes(row_bytes) {
    line_rows = std::min(max_rows, sizes.most_line_bytes / row_bytes);
    if (row_packs() > sizes.chunk_threads) line_rows = 0;
  }

  int64_t row_packs() const { return row_bytes / 16; }
  int64_t least_read_rows() const { return pieces(sizes.least_read_bytes, row_bytes); }
  bool is_read(int64_t num_rows) const {
    return num_rows >= least_read_rows() && num_rows <= sizes.most_read_bytes / row_bytes;
  }
  // Rows of a block of lines, and of a chunk of a call in bulk: few packs a thread, as long as
  // there are blocks for them.
  int64_t line_block_rows() const { return std::max<int64_t>(1, sizes.line_threads / row_packs()); }
  int64_t chunk_rows(int64_t num_rows) const {
    const int64_t once = sizes.chunk_threads * sizes.blocks;
    const int64_t packs = pieces(num_rows * row_packs(), once);
    const int64_t threads = sizes.chunk_threads * std::min(packs, sizes.chunk_packs);
    return std::max<int64_t>(1, threads / row_packs());
  }

  // Places of what others send.
  int64_t slots() const { return 2 * (ranks - 1); }
  // At 0 a word that is not 0 once a rank has given up.
  // A line a rank and half: what the call is.
  int64_t headers() const { return kLine; }
  // Of rows: two lines for 16 bytes, and one for the LSE.
  int64_t lines_a_row() const { return 2 * row_packs() + 1; }
  int64_t lines() const { return headers() + 2 * ranks * kLine; }
  // Of any call.
  int64_t most_chunks() const { return pieces(max_rows, chunk_rows(1)); }
  // Whether a failure is reported, and then of calls, for each block.
  int64_t numbers() const {
    return 1 + std::max(pieces(line_rows, line_block_rows()), sizes.blocks);
  }
  int64_t rows() const { return lines() + slots() * line_rows * lines_a_row() * kLine; }
  int64_t lses() const { return rows() + slots() * max_rows * row_bytes; }
  int64_t flags() const { return lses() + aligned(slots() * max_rows * 4); }
  // What is read where it lies: a line a row with its LSE, and who has read a chunk.
  int64_t lse_lines() const { return flags() + aligned(most_chunks() * ranks * 4); }
  int64_t acks() const { return lse_lines() + slots() * max_rows * kLine; }
  int64_t bytes() const { return acks() + aligned(most_chunks() * ranks * 4); }

  static int64_t pieces(int64_t whole, int64_t of) { return (whole + of - 1) / of; }

 private:
  static int64_t aligned(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
};

struct RanksCall {
  int64_t num_tokens, merged_heads, head_size;
  DType dtype;
  PerRow output, lse;   // of this rank, of all heads
  PerRow empty;         // bools; not given: none
  const void* lengths;  // of requests, or null
  const void* starts;   // one more
  int64_t num_requests;
  bool has_64_bit_requests;
  bool nan_is_empty;
  PerRow out, out_lse;  // merged; an LSE may not be wanted
  Base base;

  int rank, ranks;
  bool scatters;  // a rank gets its share of the heads, else all
  int64_t max_rows;
  int64_t limit_ns;          // how long others are waited for
  int64_t multiprocessors;   // of the rank's GPU that has the fewest
  char* memory[kMaxPeers];   // of each rank: a PeerLayout
  bool is_in_buffer;         // `output` is this rank's buffer, on all ranks
  char* buffers[kMaxPeers];  // of each rank, contiguous, which the others read
  uint32_t* numbers;         // of this rank alone: PeerLayout's
  int64_t* report;           // pinned host memory, four words, the first of which is not 0 then
  int32_t device_index;
  bool dependent_launch;
  void* stream;
};

}  // namespace merge_attn_states
