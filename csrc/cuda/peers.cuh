// What the kernels of a merge across ranks do: they push this rank's rows into the memory of the
// others, wait for theirs, and merge. They know addresses and the numbers of calls, nothing of
// process groups. (Plain C++ but for a few functions, so that its protocol is tested without a GPU
// too: tests/peers/.)
//
// Small calls go as lines: a 16-byte store carries two words of data and the call's number twice,
// and whoever polls it has the data as soon as the number is right: no fence, no flag, no barrier.
// Large ones go in bulk, with a flag a chunk of rows behind a fence. Rows that attention wrote into
// the shared memory itself are read where they lie: their LSEs go as lines, and a rank's call ends
// when all others have read its rows, so that these may be written anew. A block of lines, or a
// chunk, has a number of its own, which rises with each call that has it, and two places in turn: a
// rank writes call n only when it has what all others sent in call n - 1, and then these have read
// what it sent in call n - 2.
//
// A rank that waits too long, or hears of another call than its own, poisons all ranks: every
// kernel looks for that first, also one in a graph, and leaves.
#pragma once

#include <algorithm>

#include "../core/ranks_call.h"
#include "../core/state.h"
#include "fast_division.h"
#include "parts_row.cuh"
#ifdef __CUDACC__
#include "pack.cuh"
#endif

namespace merge_attn_states::cuda {

inline constexpr int kMostPacks = 4;    // of a thread in bulk
inline constexpr uint32_t kSpins = 64;  // between two looks at the clock

enum Failure : int64_t { kTimeout = 1, kDisagreement = 2, kPoisoned = 3 };

struct PeersCall {
  uint32_t num_rows, merged_heads, row_packs;
  uint32_t rows_a_block, num_blocks, chunk_threads;  // of lines, or chunks of rows
  FastDivision heads, packs;
  PerRow output, lse, empty, out, out_lse;
  const void *lengths, *starts;
  int64_t num_requests;
  bool has_64_bit_requests, nan_is_empty, scatters, is_aligned, out_is_aligned;
  LseRule rule;
  uint32_t rank, ranks;
  uint32_t num_tokens, kind;  // what ranks must agree about: tokens, base, where rows lie
  int64_t limit_ns;
  int64_t headers, lines, line_rows, rows, lses, flags, lse_lines, acks, buffer, max_rows;
  uint32_t buffer_heads;
  char* memory[kMaxPeers];
  uint32_t *calls, *numbers;
  int64_t* report;
};

#ifdef __CUDACC__
__device__ void store_line(char* to, uint32_t a, uint32_t b, uint32_t number) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(number),
               "r"(b), "r"(number)
               : "memory");
}
__device__ bool load_line(const char* from, uint32_t number, uint32_t& a, uint32_t& b) {
  uint32_t first, second;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(first), "=r"(b), "=r"(second)
               : "l"(from)
               : "memory");
  return first == number && second == number;
}
__device__ void store_release(uint32_t* to, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ int64_t now_ns() {
  int64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}
// What another GPU has written, past the caches that do not hear of it.
template <class Word>
__device__ Word load_fresh(const Word* from) {
  return __ldcv(from);
}
// Whether this is the first to change the word from 0.
__device__ bool claim(int64_t* word, int64_t value) {
  return atomicCAS_system(reinterpret_cast<unsigned long long*>(word), 0ull,
                          static_cast<unsigned long long>(value)) == 0;
}
#endif

__device__ bool is_poisoned(const PeersCall& call) {
  return *reinterpret_cast<volatile uint32_t*>(call.memory[call.rank]) != 0;
}

// Tells this rank's host, once.
__device__ void report(const PeersCall& call, Failure failure, uint32_t peer, int64_t theirs) {
  if (!claim(call.report, failure)) return;
  reinterpret_cast<volatile int64_t*>(call.report)[1] = peer;
  reinterpret_cast<volatile int64_t*>(call.report)[2] = theirs;
  __threadfence_system();
}

// Says whether this rank or another has given up, and then tells the host.
__device__ bool has_ended(const PeersCall& call) {
  if (!is_poisoned(call)) return false;
  report(call, kPoisoned, call.rank, 0);
  return true;
}

// Ends every rank's kernels, those of later calls too.
__device__ void give_up(const PeersCall& call, Failure failure, uint32_t peer, int64_t theirs) {
  report(call, failure, peer, theirs);
  for (uint32_t rank = 0; rank < call.ranks; ++rank) {
    *reinterpret_cast<volatile uint32_t*>(call.memory[rank]) = 1;
  }
}

// Spins until is_there(), for which `peer` is waited; false where this rank has given up.
template <class IsThere>
__device__ bool wait_for(const PeersCall& call, uint32_t peer, IsThere is_there) {
  int64_t begin = 0;
  for (uint32_t spin = 0; !is_there(); ++spin) {
    if (spin % kSpins != 0) continue;
    if (has_ended(call)) return false;
    const int64_t now = now_ns();
    if (begin == 0) begin = now;
    if (now - begin > call.limit_ns) {
      give_up(call, kTimeout, peer, 0);
      return false;
    }
  }
  return true;
}

__device__ uint32_t first_head(const PeersCall& call, uint32_t peer) {
  return call.scatters ? peer * call.merged_heads : 0;
}

// A row of the result.
struct MergedRow {
  uint32_t number, token, head;

  __device__ MergedRow(const PeersCall& call, uint32_t number)
      : number(number),
        token(call.heads.quotient(number)),
        head(number - token * call.merged_heads) {}
  __device__ int64_t offset(const PerRow& operand, uint32_t head_offset = 0) const {
    return token * operand.strides[0] + int64_t{head + head_offset} * operand.strides[1];
  }
};

// Whether no request with keys on this rank has the token.
template <class Index>
__device__ bool has_no_request(const PeersCall& call, uint32_t token) {
  const auto* const starts = static_cast<const Index*>(call.starts);
  // The last request that begins at or before it.
  int64_t low = 0, high = call.num_requests + 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= static_cast<Index>(token)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0 || low > call.num_requests) return true;
  return static_cast<const Index*>(call.lengths)[low - 1] == 0;
}

// As it is sent: -inf of a row that is declared empty.
__device__ float lse_of(const PeersCall& call, const MergedRow& row, uint32_t head_offset) {
  const float lse =
      load_global(static_cast<const float*>(call.lse.data) + row.offset(call.lse, head_offset));
  bool is_empty = call.nan_is_empty && lse != lse;
  if (call.empty.data != nullptr) {
    const auto* const empty = static_cast<const uint8_t*>(call.empty.data);
    is_empty |= empty[row.offset(call.empty, head_offset)] != 0;
  }
  if (call.starts != nullptr) {
    is_empty |= call.has_64_bit_requests ? has_no_request<int64_t>(call, row.token)
                                         : has_no_request<int32_t>(call, row.token);
  }
  return is_empty ? -INFINITY : lse;
}

// The sum of the parts that are not empty.
template <class PackT, int kRoom, int kElements>
__device__ void sum_taken(const float (&weights)[kRoom], const PackT (&packs)[kRoom],
                          float (&values)[kElements]) {
#pragma unroll
  for (float& value : values) value = -0.0f;
  for_each_part<kRoom>([&](auto k) {
    if (weights[k] < 0.0f) return;
    float of_part[kElements];
    packs[k].unpack(of_part);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = add_product(values[i], weights[k], of_part[i]);
  });
}

template <class T>
struct Rows {
  static constexpr int kElements = 16 / sizeof(T);
  using PackT = Pack<T, kElements>;

  static __device__ PackT load(const PeersCall& call, const MergedRow& row, uint32_t head_offset,
                               uint32_t column) {
    const T* const from = static_cast<const T*>(call.output.data) +
                          row.offset(call.output, head_offset) + int64_t{column} * kElements;
    if (call.is_aligned) return PackT::load(from);
    T elements[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) elements[i] = from[i];
    PackT pack;
    memcpy(&pack.word, elements, sizeof(pack.word));
    return pack;
  }
  static __device__ void store(const PeersCall& call, const MergedRow& row, uint32_t column,
                               PackT pack) {
    T* const to =
        static_cast<T*>(call.out.data) + row.offset(call.out) + int64_t{column} * kElements;
    if (call.out_is_aligned) return pack.store(to);
    T elements[kElements];
    memcpy(elements, &pack.word, sizeof(pack.word));
#pragma unroll
    for (int i = 0; i < kElements; ++i) to[i] = elements[i];
  }
  // The states of one row, of all ranks in their order.
  template <int kRoom>
  static __device__ void merge(const PeersCall& call, const MergedRow& row, uint32_t column,
                               const PackT (&packs)[kRoom], float (&weights)[kRoom]) {
    const auto weighed = weigh_pair_or_parts<ScalarMath<float>, float>(
        call.rule, kRoom, [&](int k) { return weights[k]; }, static_cast<const float*>(nullptr),
        [&](int k) -> float& { return weights[k]; });
    PackT merged{};
    const int taken = taken_part(weights);
    if (taken == kSummed) {
      float values[kElements];
      sum_taken(weights, packs, values);
      merged = PackT::pack(values);
    } else if (taken >= 0) {
      for_each_part<kRoom>([&](auto k) {
        if (k == taken) merged = packs[k];
      });
    }
    store(call, row, column, merged);
    if (column == 0 && call.out_lse.data != nullptr) {
      store_global(static_cast<float*>(call.out_lse.data) + row.offset(call.out_lse),
                   weighed.lse());
    }
  }
};

// A thread of a block for each peer.
__device__ bool is_peer(const PeersCall& call) {
  return threadIdx.x < call.ranks && threadIdx.x != call.rank;
}
// Whether what is sent with a number is there; it may be the next call's already.
__device__ bool has_come(const uint32_t* flag, uint32_t number) {
  return static_cast<int32_t>(load_acquire(flag) - number) >= 0;
}

// Those of block 0 say what this call is, and hear whether theirs is the same.
__device__ bool talks(const PeersCall& call) { return blockIdx.x == 0 && is_peer(call); }
__device__ void send_header(const PeersCall& call, uint32_t number, uint32_t peer) {
  char* const to =
      call.memory[peer] + call.headers + (number % 2 * call.ranks + call.rank) * int64_t{16};
  store_line(to, call.num_tokens, call.kind, number);
}
__device__ bool compare_header(const PeersCall& call, uint32_t number, uint32_t peer) {
  const char* const from =
      call.memory[call.rank] + call.headers + (number % 2 * call.ranks + peer) * int64_t{16};
  uint32_t tokens = 0, kind = 0;
  if (!wait_for(call, peer, [&] { return load_line(from, number, tokens, kind); })) return false;
  if (tokens == call.num_tokens && kind == call.kind) return true;
  give_up(call, kDisagreement, peer, int64_t{kind} << 32 | tokens);
  return false;
}

// What a block does with its rows.
template <class T, int kRoom>
__device__ void merge_by_lines(const PeersCall& call) {
  using PackT = typename Rows<T>::PackT;
  if (has_ended(call)) return;
  const uint32_t number = call.numbers[blockIdx.x] + 1, call_number = *call.calls + 1;
  if (talks(call)) send_header(call, call_number, threadIdx.x);

  const uint32_t of_block = call.packs.quotient(threadIdx.x);
  const uint32_t column = threadIdx.x - of_block * call.row_packs;
  const uint32_t at = blockIdx.x * call.rows_a_block + of_block;
  bool is_complete = true;
  if (of_block < call.rows_a_block && at < call.num_rows) {
    const MergedRow row(call, at);
    const int64_t lines_a_row = 2 * int64_t{call.row_packs} + 1;
    const auto line_of = [&](uint32_t owner, uint32_t source) {
      const int64_t place = (number % 2 * call.ranks + source) * call.line_rows + at;
      return call.memory[owner] + call.lines + place * lines_a_row * 16;
    };
    for (uint32_t k = 1; k < call.ranks; ++k) {
      const uint32_t peer = (call.rank + k) % call.ranks;
      const uint32_t head = first_head(call, peer);
      const uint4 word = Rows<T>::load(call, row, head, column).word;
      char* const to = line_of(peer, call.rank);
      store_line(to + 32 * column, word.x, word.y, number);
      store_line(to + 32 * column + 16, word.z, word.w, number);
      if (column == 0) {
        const uint32_t lse = __float_as_uint(lse_of(call, row, head));
        store_line(to + 32 * call.row_packs, lse, 0, number);
      }
    }
    float weights[kRoom];
    PackT packs[kRoom]{};
    for_each_part<kRoom>([&](auto k) {
      weights[k] = -INFINITY;
      if (k >= call.ranks || !is_complete) return;
      if (k == call.rank) {
        packs[k] = Rows<T>::load(call, row, first_head(call, k), column);
        weights[k] = lse_of(call, row, first_head(call, k));
        return;
      }
      const char* const from = line_of(call.rank, k);
      uint4& word = packs[k].word;
      uint32_t lse = 0, nothing;
      is_complete = wait_for(call, k, [&] {
        const bool first = load_line(from + 32 * column, number, word.x, word.y);
        const bool second = load_line(from + 32 * column + 16, number, word.z, word.w);
        return first && second && load_line(from + 32 * call.row_packs, number, lse, nothing);
      });
      weights[k] = __uint_as_float(lse);
    });
    if (is_complete) Rows<T>::merge(call, row, column, packs, weights);
  }
  if (talks(call)) compare_header(call, call_number, threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    call.numbers[blockIdx.x] = number;
    if (blockIdx.x == 0) *call.calls = call_number;
  }
}

// A chunk of rows on its way: its threads' packs. kReads: they are read where they lie.
template <class T, int kRoom, bool kReads>
struct Chunk {
  using PackT = typename Rows<T>::PackT;
  const PeersCall& call;
  uint32_t at, number;

  __device__ uint32_t first_row() const { return at * call.rows_a_block; }
  __device__ uint32_t packs() const {
    return min(call.rows_a_block, call.num_rows - first_row()) * call.row_packs;
  }
  __device__ int64_t place(uint32_t source) const {
    return (number % 2 * call.ranks + source) * call.max_rows + first_row();
  }
  __device__ char* rows(uint32_t owner, uint32_t source) const {
    return call.memory[owner] + call.rows + place(source) * call.row_packs * 16;
  }
  __device__ float* lses(uint32_t owner, uint32_t source) const {
    return reinterpret_cast<float*>(call.memory[owner] + call.lses) + place(source);
  }
  __device__ uint32_t* flag(uint32_t owner, uint32_t source) const {
    return reinterpret_cast<uint32_t*>(call.memory[owner] + call.flags) + at * call.ranks + source;
  }

  __device__ char* lse_lines(uint32_t owner, uint32_t source) const {
    return call.memory[owner] + call.lse_lines + place(source) * 16;
  }
  __device__ uint32_t* ack(uint32_t owner, uint32_t source) const {
    return reinterpret_cast<uint32_t*>(call.memory[owner] + call.acks) + at * call.ranks + source;
  }
  // A row of another rank's, of those that this rank gets.
  __device__ const uint4* in_buffer(uint32_t owner, const MergedRow& row) const {
    const int64_t head = row.head + first_head(call, call.rank);
    const int64_t place = row.token * int64_t{call.buffer_heads} + head;
    return reinterpret_cast<const uint4*>(call.memory[owner] + call.buffer) +
           place * call.row_packs;
  }

  __device__ void push() const {
    const uint32_t num_rows = call.packs.quotient(packs());
    for (uint32_t k = 1; k < call.ranks; ++k) {
      const uint32_t peer = (call.rank + k) % call.ranks;
      const uint32_t head = first_head(call, peer);
      if constexpr (!kReads) push_rows(peer, head);
      for (uint32_t i = threadIdx.x; i < num_rows; i += call.chunk_threads) {
        const float lse = lse_of(call, MergedRow(call, first_row() + i), head);
        if constexpr (kReads) {
          store_line(lse_lines(peer, call.rank) + 16 * i, __float_as_uint(lse), 0, number);
        } else {
          store_global(lses(peer, call.rank) + i, lse);
        }
      }
    }
    if constexpr (kReads) return;
    __syncthreads();
    if (is_peer(call)) {
      __threadfence_system();
      store_release(flag(threadIdx.x, call.rank), number);
    }
  }
  __device__ void push_rows(uint32_t peer, uint32_t head) const {
    auto* const to = reinterpret_cast<uint4*>(rows(peer, call.rank));
    uint4 words[kMostPacks];
#pragma unroll
    for (int i = 0; i < kMostPacks; ++i) {
      const uint32_t pack = threadIdx.x + i * call.chunk_threads;
      if (pack >= packs()) break;
      const uint32_t of_chunk = call.packs.quotient(pack);
      const MergedRow row(call, first_row() + of_chunk);
      words[i] = Rows<T>::load(call, row, head, pack - of_chunk * call.row_packs).word;
    }
#pragma unroll
    for (int i = 0; i < kMostPacks; ++i) {
      const uint32_t pack = threadIdx.x + i * call.chunk_threads;
      if (pack < packs()) store_global(to + pack, words[i]);
    }
  }
  // False where this rank has given up, which all threads then know.
  __device__ bool merge() const {
    bool is_complete = true;
    if constexpr (!kReads) {
      if (is_peer(call)) {
        const uint32_t* const mine = flag(call.rank, threadIdx.x);
        is_complete = wait_for(call, threadIdx.x, [&] { return has_come(mine, number); });
      }
      if (!__syncthreads_and(is_complete)) return false;
    }
#pragma unroll 1
    for (int i = 0; i < kMostPacks; ++i) {
      const uint32_t pack = threadIdx.x + i * call.chunk_threads;
      if (pack >= packs() || !is_complete) break;
      const uint32_t of_chunk = call.packs.quotient(pack);
      const uint32_t column = pack - of_chunk * call.row_packs;
      const MergedRow row(call, first_row() + of_chunk);
      float weights[kRoom];
      PackT from_all[kRoom]{};
      for_each_part<kRoom>([&](auto k) {
        weights[k] = -INFINITY;
        if (k >= call.ranks) return;
        if (k == call.rank) {
          from_all[k] = Rows<T>::load(call, row, first_head(call, k), column);
          weights[k] = lse_of(call, row, first_head(call, k));
        } else if constexpr (kReads) {
          uint32_t lse = 0, nothing;
          const char* const from = lse_lines(call.rank, k) + 16 * of_chunk;
          is_complete = is_complete &&
                        wait_for(call, k, [&] { return load_line(from, number, lse, nothing); });
          if (!is_complete) return;
          from_all[k].word = load_fresh(in_buffer(k, row) + column);
          weights[k] = __uint_as_float(lse);
        } else {
          from_all[k].word = load_fresh(reinterpret_cast<const uint4*>(rows(call.rank, k)) + pack);
          weights[k] = load_fresh(lses(call.rank, k) + of_chunk);
        }
      });
      if (is_complete) Rows<T>::merge(call, row, column, from_all, weights);
    }
    if constexpr (kReads) {
      if (!__syncthreads_and(is_complete)) return false;
      if (is_peer(call)) store_release(ack(threadIdx.x, call.rank), number);
    }
    if (threadIdx.x == 0) call.numbers[at] = number;
    return true;
  }
  // Until all others have read this rank's rows of the chunk.
  __device__ bool wait_for_readers() const {
    if (!is_peer(call)) return true;
    const uint32_t* const mine = ack(call.rank, threadIdx.x);
    return wait_for(call, threadIdx.x, [&] { return has_come(mine, number); });
  }
};

// A block pushes its next chunk while the one before is under way.
template <class T, int kRoom, bool kReads>
__device__ void merge_in_bulk(const PeersCall& call) {
  if (has_ended(call)) return;
  const uint32_t call_number = *call.calls + 1;
  if (talks(call)) send_header(call, call_number, threadIdx.x);
  uint32_t at = blockIdx.x, number = call.numbers[at] + 1;
  Chunk<T, kRoom, kReads>{call, at, number}.push();
  if (talks(call)) compare_header(call, call_number, threadIdx.x);
  for (;;) {
    const uint32_t next = at + gridDim.x;
    const bool has_next = next < call.num_blocks;
    const uint32_t next_number = has_next ? call.numbers[next] + 1 : 0;
    if (has_next) Chunk<T, kRoom, kReads>{call, next, next_number}.push();
    if (!Chunk<T, kRoom, kReads>{call, at, number}.merge()) return;
    if (!has_next) break;
    at = next;
    number = next_number;
  }
  if constexpr (kReads) {
    __syncthreads();  // the numbers are written
    for (at = blockIdx.x; at < call.num_blocks; at += gridDim.x) {
      if (!Chunk<T, kRoom, kReads>{call, at, call.numbers[at]}.wait_for_readers()) return;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *call.calls = call_number;
}

inline PeersCall peers_call(const RanksCall& call, const PeerSizes& sizes, bool& by_lines) {
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  const int64_t size = size_of(call.dtype), row_bytes = call.head_size * size;
  const int64_t num_rows = call.num_tokens * call.merged_heads;
  const PeerLayout layout(sizes, call.ranks, call.max_rows, row_bytes, 0);  // the buffer is last
  by_lines = num_rows <= layout.line_rows && !call.is_in_buffer;
  const int64_t rows_a_block = by_lines ? layout.rows_a_block : layout.chunk_rows;
  // Rows that each begin at 16 bytes.
  const auto is_aligned = [&](const PerRow& rows) {
    const auto fits = [&](int64_t stride) { return stride * size % 16 == 0; };
    return reinterpret_cast<intptr_t>(rows.data) % 16 == 0 && fits(rows.strides[0]) &&
           fits(rows.strides[1]);
  };
  PeersCall made{.num_rows = u32(num_rows),
                 .merged_heads = u32(call.merged_heads),
                 .row_packs = u32(row_bytes / 16),
                 .rows_a_block = u32(rows_a_block),
                 .num_blocks = u32((num_rows + rows_a_block - 1) / rows_a_block),
                 .chunk_threads = u32(sizes.chunk_threads),
                 .heads = FastDivision(u32(call.merged_heads)),
                 .packs = FastDivision(u32(row_bytes / 16)),
                 .output = call.output,
                 .lse = call.lse,
                 .empty = call.empty,
                 .out = call.out,
                 .out_lse = call.out_lse,
                 .lengths = call.lengths,
                 .starts = call.starts,
                 .num_requests = call.num_requests,
                 .has_64_bit_requests = call.has_64_bit_requests,
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
                 .buffer = layout.buffer(),
                 .max_rows = call.max_rows,
                 .buffer_heads = u32(call.merged_heads * (call.scatters ? call.ranks : 1)),
                 .memory = {},
                 .calls = call.numbers,
                 .numbers = call.numbers + 1 + (by_lines ? 0 : layout.line_blocks()) +
                            (call.is_in_buffer ? layout.chunks() : 0),
                 .report = call.report};
  std::copy_n(call.memory, call.ranks, made.memory);
  return made;
}

}  // namespace merge_attn_states::cuda
