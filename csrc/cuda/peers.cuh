// What the kernels of a merge across ranks do: they push this rank's rows into the memory of the
// others, wait for theirs, and merge. They know addresses and the numbers of calls, nothing of
// process groups. (Plain C++ but for a few functions, so that its protocol is tested without a GPU
// too: tests/peers/.)
//
// Small calls go as lines: a 16-byte store carries two words of data and the call's number twice,
// and whoever polls it has the data as soon as the number is right: no fence, no flag, no barrier.
// Large ones go in bulk, with a flag a chunk of rows, whose store releases them. Rows that
// attention wrote into the shared memory itself are read where they lie: their LSEs go as lines,
// and a rank's call ends when all others have read its rows, so that these may be written anew.
// What is sent in call n lies in half n % 2 of its place: a rank is in call n only when it has what
// all others sent in call n - 1, and then these have read what it sent in call n - 2.
//
// A rank that waits too long, or hears of another call than its own, poisons all ranks: every
// kernel looks for that first, also one in a graph, and leaves.
#pragma once

#include "peers_call.h"
#include "peers_rows.cuh"
#include "peers_wait.cuh"

namespace merge_attn_states::cuda {

inline constexpr int kMostPacks = 4;  // of a thread in bulk

// Of the calls before, each block has a count of its own: another block may have ended this call
// already. The blocks of a small grid write those of a larger one too.
__device__ uint32_t number_of_call(const PeersCall& call) {
  return next_number(call.numbers[blockIdx.x]);
}
__device__ void end_call(const PeersCall& call, uint32_t number) {
  __syncthreads();  // all threads have read it
  const uint32_t stride = gridDim.x * blockDim.x;
  for (uint32_t i = blockIdx.x + threadIdx.x * gridDim.x; i < call.num_numbers; i += stride) {
    call.numbers[i] = number;
  }
}

// What a block does with its rows.
template <class T, int kRoom>
__device__ void merge_by_lines(const PeersCall& call) {
  using PackT = typename Rows<T>::PackT;
  const uint32_t number = number_of_call(call);
  if (has_ended(call)) return;
  if (talks(call)) send_header(call, number, threadIdx.x);

  const uint32_t of_block = call.packs.quotient(threadIdx.x);
  const uint32_t column = threadIdx.x - of_block * call.row_packs;
  const uint32_t at = blockIdx.x * call.rows_a_block + of_block;
  if (of_block < call.rows_a_block && at < call.num_rows) {
    const MergedPack pack{MergedRow(call, at), column};
    const auto line_of = [&](uint32_t owner, uint32_t source) {
      const int64_t place = slot<kRoom>(call, number, owner, source) * call.line_rows + at;
      return call.memory[owner] + call.lines + place * call.lines_a_row * 16;
    };
    // Of so many peers what they get is loaded before the first of it is sent.
    constexpr uint32_t kAtOnce = kRoom == 2 ? 1 : 4;
    const uint32_t ranks = ranks_of<kRoom>(call);
#pragma unroll 1
    for (uint32_t first = 1; first < ranks; first += kAtOnce) {
      uint4 words[kAtOnce];
      float lses[kAtOnce]{};
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        if (first + i >= ranks) continue;
        const uint32_t head = first_head(call, peer_after<kRoom>(call, first + i));
        words[i] = Rows<T>::load(call, pack.row, head, column).word;
        if (column == 0) lses[i] = lse_of(call, pack.row, head);
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        if (first + i >= ranks) continue;
        char* const to = line_of(peer_after<kRoom>(call, first + i), call.rank);
        store_line(to + 32 * column, words[i].x, words[i].y, number);
        store_line(to + 32 * column + 16, words[i].z, words[i].w, number);
        if (column == 0) store_line(to + 32 * call.row_packs, __float_as_uint(lses[i]), 0, number);
      }
    }
    const auto receive = [&](uint32_t k, float* lse, PackT* theirs) {
      const char* const from = line_of(call.rank, k);
      return wait_for(call, k, [&] {
        bool is_there = true;
        if (theirs != nullptr) {
          uint4& word = theirs->word;
          is_there = load_line(from + 32 * column, number, word.x, word.y);
          is_there &= load_line(from + 32 * column + 16, number, word.z, word.w);
        }
        if (lse != nullptr) {
          uint32_t bits, nothing;
          is_there &= load_line(from + 32 * call.row_packs, number, bits, nothing);
          *lse = __uint_as_float(bits);
        }
        return is_there;
      });
    };
    PackMerge<T, kRoom>::merge(call, pack, receive);
  }
  if (talks(call)) compare_header(call, number, threadIdx.x);
  end_call(call, number);
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
  __device__ int64_t place(uint32_t owner, uint32_t source) const {
    return slot<kRoom>(call, number, owner, source) * call.max_rows + first_row();
  }
  __device__ char* rows(uint32_t owner, uint32_t source) const {
    return call.memory[owner] + call.rows + place(owner, source) * call.row_packs * 16;
  }
  __device__ float* lses(uint32_t owner, uint32_t source) const {
    return reinterpret_cast<float*>(call.memory[owner] + call.lses) + place(owner, source);
  }
  // Of the flags or the acks.
  __device__ uint32_t* word(int64_t words, uint32_t owner, uint32_t source) const {
    return reinterpret_cast<uint32_t*>(call.memory[owner] + words) + at * call.ranks + source;
  }
  __device__ char* lse_lines(uint32_t owner, uint32_t source) const {
    return call.memory[owner] + call.lse_lines + place(owner, source) * 16;
  }
  // A row of another rank's, of those that this rank gets.
  __device__ const uint4* in_buffer(uint32_t owner, const MergedRow& row) const {
    const int64_t head = row.head + first_head(call, call.rank);
    const int64_t place = row.token * int64_t{call.buffer_heads} + head;
    return reinterpret_cast<const uint4*>(call.buffers[owner]) + place * call.row_packs;
  }

  // Of the chunk's packs.
  __device__ MergedPack place_of(uint32_t pack) const {
    const uint32_t row = call.packs.quotient(pack);
    return {MergedRow(call, first_row() + row), pack - row * call.row_packs};
  }

  // Sends what others merge; behind announce() they know that it is there.
  __device__ void push() const {
    const uint32_t num_rows = call.packs.quotient(packs());
#pragma unroll 1
    for (uint32_t k = 1; k < ranks_of<kRoom>(call); ++k) {
      const uint32_t peer = peer_after<kRoom>(call, k);
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
  }
  // Behind a barrier: a release orders what other threads stored before it, too.
  __device__ void announce() const {
    if (!kReads && is_peer(call)) {
      store_release(word(call.flags, threadIdx.x, call.rank), number);
    }
  }
  __device__ void push_rows(uint32_t peer, uint32_t head) const {
    auto* const to = reinterpret_cast<uint4*>(rows(peer, call.rank));
    uint4 words[kMostPacks];
#pragma unroll
    for (int i = 0; i < kMostPacks; ++i) {
      const uint32_t pack = threadIdx.x + i * call.chunk_threads;
      if (pack >= packs()) continue;
      const MergedPack at = place_of(pack);
      words[i] = Rows<T>::load(call, at.row, head, at.column).word;
    }
#pragma unroll
    for (int i = 0; i < kMostPacks; ++i) {
      const uint32_t pack = threadIdx.x + i * call.chunk_threads;
      if (pack < packs()) store_global(to + pack, words[i]);
    }
  }
  // Gets what a pack needs of another rank, which is there, but for an LSE of rows that are read.
  __device__ bool receive(uint32_t k, uint32_t pack, float* lse, PackT* theirs) const {
    const uint32_t row = call.packs.quotient(pack);
    if constexpr (kReads) {
      const MergedPack at = place_of(pack);
      if (lse != nullptr) {
        const char* const from = lse_lines(call.rank, k) + 16 * row;
        uint32_t bits = 0, nothing;
        if (!wait_for(call, k, [&] { return load_line(from, number, bits, nothing); })) {
          return false;
        }
        *lse = __uint_as_float(bits);
      }
      if (theirs != nullptr) theirs->word = load_fresh(in_buffer(k, at.row) + at.column);
    } else {
      if (lse != nullptr) *lse = load_fresh(lses(call.rank, k) + row);
      if (theirs != nullptr) {
        theirs->word = load_fresh(reinterpret_cast<const uint4*>(rows(call.rank, k)) + pack);
      }
    }
    return true;
  }
  // Until what others send is there. False where this rank has given up, which all threads know.
  __device__ bool wait() const {
    bool is_there = true;
    if (!kReads && is_peer(call)) {
      const uint32_t* const mine = word(call.flags, call.rank, threadIdx.x);
      is_there = wait_for(call, threadIdx.x, [&] { return has_come(mine, number); });
    }
    return __syncthreads_and(is_there);
  }
  // Likewise.
  __device__ bool merge() const {
    bool is_complete = true;
#pragma unroll 1
    for (uint32_t pack = threadIdx.x; pack < packs() && is_complete; pack += call.chunk_threads) {
      const auto get = [&](uint32_t k, float* lse, PackT* theirs) {
        return receive(k, pack, lse, theirs);
      };
      is_complete = PackMerge<T, kRoom>::merge(call, place_of(pack), get);
    }
    if constexpr (kReads) {
      if (!__syncthreads_and(is_complete)) return false;
      if (is_peer(call)) store_release(word(call.acks, threadIdx.x, call.rank), number);
    }
    return true;
  }
  // Until all others have read this rank's rows of the chunk.
  __device__ bool wait_for_readers() const {
    if (!is_peer(call)) return true;
    const uint32_t* const mine = word(call.acks, call.rank, threadIdx.x);
    return wait_for(call, threadIdx.x, [&] { return has_come(mine, number); });
  }
};

// A block pushes its next chunk, which is under way while it merges the one before.
template <class T, int kRoom, bool kReads>
__device__ void merge_in_bulk(const PeersCall& call) {
  const uint32_t number = number_of_call(call);
  const auto chunk = [&](uint32_t at) { return Chunk<T, kRoom, kReads>{call, at, number}; };
  // All threads or none: those that are left would announce a chunk that is not whole.
  if (!__syncthreads_and(!has_ended(call))) return;
  if (talks(call)) send_header(call, number, threadIdx.x);
  uint32_t at = blockIdx.x;
  chunk(at).push();
  __syncthreads();
  chunk(at).announce();
  if (talks(call)) compare_header(call, number, threadIdx.x);
  for (uint32_t next = at + gridDim.x;; at = next, next += gridDim.x) {
    if (next < call.num_blocks) chunk(next).push();
    if (!chunk(at).wait()) return;
    if (!chunk(at).merge()) return;
    if (next >= call.num_blocks) break;
    chunk(next).announce();
  }
  if constexpr (kReads) {
    for (at = blockIdx.x; at < call.num_blocks; at += gridDim.x) {
      if (!chunk(at).wait_for_readers()) return;
    }
    if (has_ended(call)) return;  // who has given up may write its rows anew while others read
  }
  end_call(call, number);
}

}  // namespace merge_attn_states::cuda
