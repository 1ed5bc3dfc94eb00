// The protocol of csrc/cuda/peers.cuh with a CPU thread for each of a GPU's: several ranks call
// merges of random sizes at random times, as lines and in bulk; some never come, some disagree.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

// What CUDA has.
struct Index {
  uint32_t x;
};
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;
struct uint4 {
  uint32_t x, y, z, w;
};
struct Block {
  explicit Block(int threads) : barrier(threads) {}
  std::barrier<> barrier;
  std::atomic<int> nays{0};
};
static thread_local Block* block;
#define __device__
#define __noinline__ __attribute__((noinline))
#define __syncthreads() block->barrier.arrive_and_wait()
static bool __syncthreads_and(bool aye) {
  if (!aye) ++block->nays;
  block->barrier.arrive_and_wait();
  const bool all = block->nays == 0;
  block->barrier.arrive_and_wait();
  return all;
}
static void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
using std::min;
static uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
static float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

#include "../../csrc/core/dtypes.h"
#include "../../csrc/core/state.h"

namespace merge_attn_states::cuda {

// Each half of a line, data and number, is stored at once, and the halves in either order.
static uint64_t half(uint32_t data, uint32_t number) { return data | uint64_t{number} << 32; }
static std::atomic_ref<uint64_t> half_at(const char* line, int i) {
  return std::atomic_ref<uint64_t>(reinterpret_cast<uint64_t*>(const_cast<char*>(line))[i]);
}
static void store_line(char* to, uint32_t a, uint32_t b, uint32_t number) {
  static thread_local std::minstd_rand random(
      static_cast<uint32_t>(reinterpret_cast<intptr_t>(to)));
  if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
  half_at(to, 1).store(half(b, number));
  half_at(to, 0).store(half(a, number));
}
static bool load_line(const char* from, uint32_t number, uint32_t& a, uint32_t& b) {
  const uint64_t first = half_at(from, 0).load(), second = half_at(from, 1).load();
  a = static_cast<uint32_t>(first);
  b = static_cast<uint32_t>(second);
  return first >> 32 == number && second >> 32 == number;
}
static void store_release(uint32_t* to, uint32_t value) {
  std::atomic_ref<uint32_t>(*to).store(value, std::memory_order_release);
}
static uint32_t load_acquire(const uint32_t* from) {
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(from)).load(std::memory_order_acquire);
}
static int64_t now_ns() {
  std::this_thread::yield();  // others are to run
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}
static bool claim(uint32_t* word) { return std::atomic_ref<uint32_t>(*word).exchange(1) == 0; }
template <class Word>
static Word load_fresh(const Word* from) {
  return *from;
}
template <class Word>
static Word load_global(const Word* from) {
  return *from;
}
template <class Word>
static void store_global(Word* to, Word word) {
  *to = word;
}
template <class T, int kElements>
struct Pack;
template <>
struct Pack<float, 4> {
  uint4 word;
  static Pack load(const float* from) {
    Pack pack;
    std::memcpy(&pack, from, sizeof(pack));
    return pack;
  }
  void store(float* to) const { std::memcpy(to, &word, sizeof(word)); }
  void unpack(float (&values)[4]) const { std::memcpy(values, &word, sizeof(word)); }
  static Pack pack(const float (&values)[4]) { return load(values); }
};

}  // namespace merge_attn_states::cuda

#include "../../csrc/cuda/peers.cuh"

using namespace merge_attn_states;

namespace {

constexpr PeerSizes kSizes{.line_threads = 8,
                           .most_line_bytes = 512,
                           .chunk_threads = 8,  // as many as ranks, and more
                           .chunk_packs = cuda::kMostPacks,
                           .blocks = 2,
                           .least_read_bytes = 128,
                           .most_read_bytes = 2048};

std::atomic<int> failures{0};

#define EXPECT(condition, ...)                    \
  do {                                            \
    if (!(condition)) {                           \
      if (++failures < 20) {                      \
        std::fprintf(stderr, "%s: ", #condition); \
        std::fprintf(stderr, __VA_ARGS__);        \
        std::fprintf(stderr, "\n");               \
      }                                           \
    }                                             \
  } while (false)

// What a rank has for an object's whole life.
struct Rank {
  std::vector<uint4> memory, buffer;
  std::vector<uint32_t> numbers;
  alignas(16) int64_t report[4]{};
};

struct Group {
  int ranks, heads, head_size;
  bool scatters;
  int64_t max_tokens;
  PeerLayout layout;
  std::vector<Rank> of;

  Group(int ranks, int merged_heads, int head_size, bool scatters, int64_t max_tokens,
        uint32_t calls_before = 0)
      : ranks(ranks),
        heads(scatters ? merged_heads * ranks : merged_heads),
        head_size(head_size),
        scatters(scatters),
        max_tokens(max_tokens),
        layout(kSizes, ranks, max_tokens * merged_heads, head_size * 4),
        of(ranks) {
    for (Rank& rank : of) {
      rank.memory.resize(layout.bytes() / 16);
      rank.buffer.resize(max_tokens * heads * head_size / 4);
      rank.numbers.resize(layout.numbers(), calls_before);
      rank.numbers[0] = 0;  // nothing is reported
    }
  }
  int merged_heads() const { return scatters ? heads / ranks : heads; }
};

// One rank's state of one call, made of the call's seed; every rank can make that of all.
struct State {
  static constexpr int kRequests = 3;

  int64_t heads;
  std::vector<float> output, lse;
  std::vector<uint8_t> mask;             // none: not given
  std::vector<int64_t> starts, lengths;  // of requests; none: not given
  Base base = Base::kE;
  bool is_shifted = false;  // its rows do not begin at 16 bytes

  State(const Group& group, int64_t tokens, uint32_t seed, int rank) : heads(group.heads) {
    std::mt19937 same(seed), random(seed * 97 + rank);
    std::normal_distribution<float> normal;
    if (seed % 5 == 1) base = Base::kTwo;
    is_shifted = seed % 2 == 1;
    output.resize(tokens * heads * group.head_size + 1);
    lse.resize(tokens * heads);
    for (float& value : output) value = normal(random);
    for (float& value : lse) {
      const float of[] = {-INFINITY, INFINITY, NAN};
      value = random() % 4 == 0 ? of[random() % 3] : 3 * normal(random);
    }
    if (seed % 3 == 1) {
      for (int64_t i = 0; i < tokens * heads; ++i) mask.push_back(random() % 4 == 0);
    }
    if (seed % 3 == 2) {
      for (int i = 0; i <= kRequests; ++i) starts.push_back(same() % (tokens + 1));
      std::sort(starts.begin(), starts.end());
      for (int i = 0; i < kRequests; ++i) lengths.push_back(random() % 3);
    }
  }
  const float* rows() const { return output.data() + is_shifted; }
  // Of a token and a head, by what the contract says of requests: -inf of an empty row.
  double lse_of(int64_t token, int64_t head) const {
    const int64_t i = token * heads + head;
    bool is_empty = !std::isfinite(lse[i]) || (!mask.empty() && mask[i] != 0);
    if (!starts.empty()) {
      bool has_keys = false;
      for (int r = 0; r < kRequests; ++r) {
        has_keys |= starts[r] <= token && token < starts[r + 1] && lengths[r] > 0;
      }
      is_empty |= !has_keys;
    }
    return is_empty ? -INFINITY : lse[i];
  }
};

// A kernel: its blocks' threads, all at once.
void launch(const RanksCall& call) {
  const cuda::PeersLaunch cut = cuda::peers_launch(call, kSizes);
  const auto blocks = static_cast<uint32_t>(cut.blocks);
  const int threads = static_cast<int>(cut.threads);
  std::vector<std::unique_ptr<Block>> made;
  std::vector<std::thread> all;
  for (uint32_t b = 0; b < blocks; ++b) {
    made.push_back(std::make_unique<Block>(threads));
    for (int t = 0; t < threads; ++t) {
      all.emplace_back([&, b, t, own = made.back().get()] {
        blockIdx = {b};
        threadIdx = {static_cast<uint32_t>(t)};
        blockDim = {static_cast<uint32_t>(threads)};
        gridDim = {blocks};
        block = own;
        const auto run = [&]<int kRoom>() {
          switch (cut.way) {
            case cuda::Way::kLines:
              return cuda::merge_by_lines<float, kRoom>(cut.call);
            case cuda::Way::kBulk:
              return cuda::merge_in_bulk<float, kRoom, false>(cut.call);
            case cuda::Way::kReading:
              return cuda::merge_in_bulk<float, kRoom, true>(cut.call);
          }
        };
        call.ranks == 2 ? run.operator()<2>() : run.operator()<kMaxPeers>();
        block->barrier.arrive_and_drop();  // who has left is not waited for
      });
    }
  }
  for (std::thread& thread : all) thread.join();
}

struct Result {
  std::vector<float> out, lse;
};

Result call(Group& group, int rank, int64_t tokens, uint32_t seed, int64_t limit_ms,
            std::optional<Base> base = {}) {
  const State state(group, tokens, seed, rank);
  const int64_t heads = group.heads, merged = group.merged_heads(), size = group.head_size;
  Result result{std::vector<float>(tokens * merged * size, NAN),
                std::vector<float>(tokens * merged, NAN)};
  const std::vector<int32_t> starts(state.starts.begin(), state.starts.end());
  const std::vector<int32_t> lengths(state.lengths.begin(), state.lengths.end());
  const bool wide = seed % 2 == 0;
  RanksCall made{};
  made.num_tokens = tokens;
  made.merged_heads = merged;
  made.head_size = size;
  made.dtype = DType::kFloat32;
  made.output = {const_cast<float*>(state.rows()), {heads * size, size, 0, 0}};
  // Of two calls of seven attention writes into the shared memory.
  if (seed % 7 >= 5) {
    void* const buffer = group.of[rank].buffer.data();
    std::memcpy(buffer, state.rows(), tokens * heads * size * sizeof(float));
    made.output.data = buffer;
    made.is_in_buffer = true;
  }
  made.lse = {const_cast<float*>(state.lse.data()), {heads, 1, 0, 0}};
  if (!state.mask.empty()) {
    made.empty = {const_cast<uint8_t*>(state.mask.data()), {heads, 1, 0, 0}};
  }
  if (!starts.empty()) {
    made.starts = wide ? static_cast<const void*>(state.starts.data()) : starts.data();
    made.lengths = wide ? static_cast<const void*>(state.lengths.data()) : lengths.data();
    made.num_requests = State::kRequests;
    made.has_64_bit_requests = wide;
  }
  made.nan_is_empty = true;
  made.out = {result.out.data(), {merged * size, size, 0, 0}};
  made.out_lse = {result.lse.data(), {merged, 1, 0, 0}};
  made.base = base.value_or(state.base);
  made.rank = rank;
  made.ranks = group.ranks;
  made.scatters = group.scatters;
  made.max_rows = group.layout.max_rows;
  made.limit_ns = limit_ms * 1000000;
  made.multiprocessors = 3;  // which not all lines would fit on
  for (int peer = 0; peer < group.ranks; ++peer) {
    made.memory[peer] = reinterpret_cast<char*>(group.of[peer].memory.data());
    made.buffers[peer] = reinterpret_cast<char*>(group.of[peer].buffer.data());
  }
  made.numbers = group.of[rank].numbers.data();
  made.report = group.of[rank].report;
  launch(made);
  return result;
}

// In float64, of a rank's share of the heads.
void compare(const Group& group, int rank, int64_t tokens, uint32_t seed, const Result& result) {
  std::vector<State> states;
  for (int peer = 0; peer < group.ranks; ++peer) states.emplace_back(group, tokens, seed, peer);
  const int64_t merged = group.merged_heads(), size = group.head_size;
  const int64_t first = group.scatters ? rank * merged : 0;
  const double ln_base = states[0].base == Base::kTwo ? std::log(2.0) : 1.0;
  for (int64_t row = 0; row < tokens * merged; ++row) {
    const int64_t token = row / merged, head = first + row % merged;
    double largest = -INFINITY, sum = 0;
    for (const State& state : states) largest = std::max(largest, state.lse_of(token, head));
    const auto weight = [&](const State& state) {
      const double lse = state.lse_of(token, head);
      return lse > -INFINITY ? std::exp((lse - largest) * ln_base) : 0.0;
    };
    for (const State& state : states) sum += weight(state);
    const double lse = sum > 0 ? largest + std::log(sum) / ln_base : -INFINITY;
    EXPECT(result.lse[row] == lse || std::fabs(result.lse[row] - lse) < 1e-5,
           "row %ld of %ld tokens on rank %d: %g for %g", row, tokens, rank, result.lse[row], lse);
    for (int64_t i = 0; i < size; ++i) {
      double value = 0;
      for (const State& state : states) {
        if (weight(state) == 0) continue;
        value += weight(state) / sum * state.rows()[(token * group.heads + head) * size + i];
      }
      EXPECT(std::fabs(result.out[row * size + i] - value) < 1e-5,
             "row %ld, element %ld of %ld tokens on rank %d: %g for %g", row, i, tokens, rank,
             result.out[row * size + i], value);
    }
  }
}

// All ranks at once, each with a stream of calls.
void on_all(const Group& group, const std::function<void(int)>& f) {
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < group.ranks; ++rank) ranks.emplace_back(f, rank);
  for (std::thread& thread : ranks) thread.join();
}

void random_calls(int ranks, bool scatters, int calls, uint32_t calls_before = 0) {
  Group group(ranks, 2, 8, scatters, 40, calls_before);
  int by_lines = 0;
  on_all(group, [&](int rank) {
    std::mt19937 sizes(7), delays(rank);
    for (int i = 0; i < calls; ++i) {
      const int64_t tokens = sizes() % 3 == 0 ? 1 + sizes() % 40 : 1 + sizes() % 4;
      if (rank == 0) {
        by_lines += tokens * group.merged_heads() <= group.layout.line_rows && i % 7 < 5;
      }
      if (delays() % 4 == 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(delays() % 3000));
      }
      compare(group, rank, tokens, i, call(group, rank, tokens, i, 20000));
      EXPECT(group.of[rank].report[0] == 0, "call %d on rank %d", i, rank);
    }
  });
  EXPECT(0 < by_lines && by_lines < calls, "%d of %d calls as lines", by_lines, calls);
}

// A rank that does not come ends the call of all others, and each later one, its own too.
void absent(int ranks, int64_t tokens, uint32_t seed) {
  Group group(ranks, 2, 8, true, 24);
  on_all(group, [&](int rank) {
    if (rank > 0) call(group, rank, tokens, seed, 100);
  });
  // Who gives up first says whom it waited for.
  int named = 0;
  for (int rank = 1; rank < ranks; ++rank) {
    const int64_t* report = group.of[rank].report;
    named += report[0] == cuda::kTimeout && report[1] == 0;
    EXPECT(report[0] == cuda::kTimeout || report[0] == cuda::kPoisoned, "reports %ld", report[0]);
  }
  EXPECT(named > 0, "nobody names rank 0");
  const auto begin = std::chrono::steady_clock::now();
  on_all(group, [&](int rank) { call(group, rank, tokens, 1, 60000); });
  EXPECT(std::chrono::steady_clock::now() - begin < std::chrono::seconds(10), "later calls wait");
  EXPECT(group.of[0].report[0] == cuda::kPoisoned, "reports %ld", group.of[0].report[0]);
}

// A rank's result is right, or its host hears that another gave up: whenever poison comes.
void poisoned(int ranks, int64_t tokens, uint32_t seed, int times) {
  for (int i = 0; i < times; ++i) {
    Group group(ranks, 2, 8, true, 40);
    on_all(group, [&](int rank) { call(group, rank, tokens, seed, 20000); });
    std::thread poison([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(i * 7 % 900));
      for (Rank& rank : group.of) *reinterpret_cast<volatile uint32_t*>(rank.memory.data()) = 1;
    });
    on_all(group, [&](int rank) {
      const Result result = call(group, rank, tokens, seed, 20000);
      if (group.of[rank].report[0] == 0) compare(group, rank, tokens, seed, result);
    });
    poison.join();
  }
}

void disagreement(int64_t one, int64_t other, Base base) {
  Group group(2, 2, 8, true, 24);
  on_all(group, [&](int rank) {
    call(group, rank, rank == 0 ? one : other, 0, 60000, rank == 0 ? Base::kE : base);
  });
  int named = 0;
  for (int rank = 0; rank < 2; ++rank) {
    const int64_t* report = group.of[rank].report;
    EXPECT(report[0] == cuda::kDisagreement || report[0] == cuda::kPoisoned, "reports %ld",
           report[0]);
    if (report[0] != cuda::kDisagreement) continue;
    ++named;
    const int64_t theirs = rank == 0 ? other : one;
    const int64_t their_base = rank == 0 && base == Base::kTwo;
    EXPECT(report[1] == 1 - rank && report[2] == (their_base << 32 | theirs), "of rank %ld: %lx",
           report[1], report[2]);
  }
  EXPECT(named > 0, "nobody names it");
}

}  // namespace

int main(int count, char** arguments) {
  const int calls = count > 1 ? std::atoi(arguments[1]) : 60;
  for (const bool scatters : {true, false}) {
    for (const int ranks : {2, 3}) random_calls(ranks, scatters, calls);
    random_calls(7, scatters, calls / 4);  // more than a thread keeps the packs of
  }
  // Where memory that no call has used yet must not look like a later one's.
  for (const uint32_t before : {0x80000010, cuda::kLastNumber - 8}) {
    random_calls(2, true, calls / 4, before);
  }
  for (const int64_t tokens : {1, 24}) {
    for (const uint32_t seed : {0, 6}) absent(3, tokens, seed);
  }
  for (const uint32_t seed : {0, 6}) poisoned(3, 30, seed, calls);
  poisoned(3, 4, 0, calls);
  disagreement(3, 5, Base::kE);    // as lines both
  disagreement(20, 24, Base::kE);  // in bulk both
  disagreement(24, 2, Base::kE);   // one as lines
  disagreement(2, 2, Base::kTwo);
  std::printf("%d failures\n", failures.load());
  return failures != 0;
}
