// How the kernels of a merge across ranks hear of each other: stores that carry their own flag,
// flags, waiting, and giving up. (Plain C++ but for the first few functions.)
#pragma once

#include "peers_call.h"

namespace merge_attn_states::cuda {

inline constexpr uint32_t kSpins = 64;  // between two looks at the clock

enum Failure : int64_t { kTimeout = 1, kDisagreement = 2, kPoisoned = 3 };

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
// Whether this is the first of this GPU's threads to claim the word.
__device__ bool claim(uint32_t* word) { return atomicExch(word, 1u) == 0; }
#endif

__device__ bool is_poisoned(const PeersCall& call) {
  return *reinterpret_cast<volatile uint32_t*>(call.memory[call.rank]) != 0;
}

// Tells this rank's host, once.
__device__ __noinline__ void report(const PeersCall& call, Failure failure, uint32_t peer,
                                    int64_t theirs) {
  if (!claim(call.is_reported)) return;
  auto* const words = static_cast<volatile int64_t*>(call.report);
  words[1] = peer;
  words[2] = theirs;
  __threadfence_system();
  words[0] = failure;  // last: the host reads the others once this is not 0
  __threadfence_system();
}

// Says whether this rank or another has given up, and then tells the host.
__device__ bool has_ended(const PeersCall& call) {
  if (!is_poisoned(call)) return false;
  report(call, kPoisoned, call.rank, 0);
  return true;
}

// Ends every rank's kernels, those of later calls too.
__device__ __noinline__ void give_up(const PeersCall& call, Failure failure, uint32_t peer,
                                     int64_t theirs) {
  report(call, failure, peer, theirs);
#pragma unroll 1
  for (uint32_t rank = 0; rank < call.ranks; ++rank) {
    *reinterpret_cast<volatile uint32_t*>(call.memory[rank]) = 1;
  }
}

// Whether one who waits for `peer` since `begin`, 0 at first, may go on. Not inlined: it stands in
// every wait, and what is there at once is not to wait for its code.
__device__ __noinline__ bool may_wait(const PeersCall& call, uint32_t peer, int64_t& begin) {
  if (has_ended(call)) return false;
  const int64_t now = now_ns();
  if (begin == 0) begin = now;
  if (now - begin <= call.limit_ns) return true;
  give_up(call, kTimeout, peer, 0);
  return false;
}

// Spins until is_there(), for which `peer` is waited; false where this rank has given up.
template <class IsThere>
__device__ bool wait_for(const PeersCall& call, uint32_t peer, IsThere is_there) {
  int64_t begin = 0;
  for (uint32_t spin = 1; !is_there(); ++spin) {
    if (spin % kSpins == 0 && !may_wait(call, peer, begin)) return false;
  }
  return true;
}

// A thread of a block for each peer.
__device__ bool is_peer(const PeersCall& call) {
  return threadIdx.x < call.ranks && threadIdx.x != call.rank;
}
// Calls are numbered from 1 on and, four billion later, again: 0 is what memory holds at first.
inline constexpr uint32_t kLastNumber = 0xfffffffe;
static_assert(kLastNumber % 2 == 0);  // the half of the memory changes with each call
__device__ uint32_t next_number(uint32_t number) { return number == kLastNumber ? 1 : number + 1; }

// Whether what is sent with a number is there; it may be the next call's already.
__device__ bool has_come(const uint32_t* flag, uint32_t number) {
  const uint32_t found = load_acquire(flag);
  return found == number || found == next_number(number);
}

// Those of block 0 say what this call is, and hear whether theirs is the same.
__device__ bool talks(const PeersCall& call) { return blockIdx.x == 0 && is_peer(call); }
__device__ char* header(const PeersCall& call, uint32_t number, uint32_t owner, uint32_t source) {
  return call.memory[owner] + call.headers + (number % 2 * call.ranks + source) * int64_t{16};
}
__device__ void send_header(const PeersCall& call, uint32_t number, uint32_t peer) {
  store_line(header(call, number, peer, call.rank), call.num_tokens, call.kind, number);
}
__device__ bool compare_header(const PeersCall& call, uint32_t number, uint32_t peer) {
  const char* const from = header(call, number, call.rank, peer);
  uint32_t tokens = 0, kind = 0;
  if (!wait_for(call, peer, [&] { return load_line(from, number, tokens, kind); })) return false;
  if (tokens == call.num_tokens && kind == call.kind) return true;
  give_up(call, kDisagreement, peer, int64_t{kind} << 32 | tokens);
  return false;
}

}  // namespace merge_attn_states::cuda
