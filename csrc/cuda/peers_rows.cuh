// A row of a merge across ranks: where it lies, whether this rank has keys for it, and its merge.
#pragma once

#include "parts_row.cuh"
#include "peers_call.h"
#ifdef __CUDACC__
#include "pack.cuh"
#endif

namespace merge_attn_states::cuda {

inline constexpr int kHeldRanks = 4;  // of which a thread keeps the packs

// A kernel of two ranks knows that they are two.
template <int kRoom>
__device__ uint32_t ranks_of(const PeersCall& call) {
  return kRoom == 2 ? 2 : call.ranks;
}
// The one that this rank sends to as its k-th, so that not all send to one at once.
template <int kRoom>
__device__ uint32_t peer_after(const PeersCall& call, uint32_t k) {
  const uint32_t peer = call.rank + k, ranks = ranks_of<kRoom>(call);
  return peer < ranks ? peer : peer - ranks;
}

// Where what `source` sends lies in the memory of `owner`, of call `number`.
template <int kRoom>
__device__ int64_t slot(const PeersCall& call, uint32_t number, uint32_t owner, uint32_t source) {
  const uint32_t others = ranks_of<kRoom>(call) - 1;
  return number % 2 * others + (source < owner ? source : source - 1);
}

__device__ uint32_t first_head(const PeersCall& call, uint32_t peer) {
  return call.scatters ? peer * call.merged_heads : 0;
}

// A row of the result.
struct MergedRow {
  uint32_t token, head;

  __device__ MergedRow(const PeersCall& call, uint32_t number)
      : token(call.heads.quotient(number)), head(number - token * call.merged_heads) {}
  __device__ int64_t offset(const PerRow& operand, uint32_t head_offset = 0) const {
    return token * operand.strides[0] + int64_t{head + head_offset} * operand.strides[1];
  }
};

// Of the starts or the lengths.
__device__ int64_t of_requests(const PeersCall& call, const void* from, int64_t at) {
  return call.has_64_bit_requests ? static_cast<const int64_t*>(from)[at]
                                  : static_cast<const int32_t*>(from)[at];
}

// Whether no request with keys on this rank has the token.
__device__ bool has_no_request(const PeersCall& call, uint32_t token) {
  // The last request that begins at or before it.
  int64_t low = 0, high = call.num_requests + 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (of_requests(call, call.starts, middle) <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0 || low > call.num_requests) return true;
  return of_requests(call, call.lengths, low - 1) == 0;
}

// Of a call that declares rows empty, by a mask or by requests.
__device__ __noinline__ bool is_declared_empty(const PeersCall& call, const MergedRow& row,
                                               uint32_t head_offset) {
  if (call.empty.data != nullptr) {
    const auto* const empty = static_cast<const uint8_t*>(call.empty.data);
    return empty[row.offset(call.empty, head_offset)] != 0;
  }
  return has_no_request(call, row.token);
}

// As it is sent: -inf of a row that is declared empty.
__device__ float lse_of(const PeersCall& call, const MergedRow& row, uint32_t head_offset) {
  const float lse =
      load_global(static_cast<const float*>(call.lse.data) + row.offset(call.lse, head_offset));
  bool is_empty = call.nan_is_empty && lse != lse;
  if (call.declares_empty) is_empty |= is_declared_empty(call, row, head_offset);
  return is_empty ? -INFINITY : lse;
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
  // Merges a pack of a row, of all ranks in their order. receive(k, lse, pack) gets what is not
  // null of another rank's, and is false where this rank has given up. Few ranks' packs are under
  // way before the first is used; of more, the others come one by one once all are weighed.
  template <int kRoom, class Receive>
  static __device__ bool merge(const PeersCall& call, const MergedRow& row, uint32_t column,
                               Receive receive) {
    constexpr int kHeld = kRoom < kHeldRanks ? kRoom : kHeldRanks;
    const PackT own = load(call, row, first_head(call, call.rank), column);
    const float own_lse = lse_of(call, row, first_head(call, call.rank));
    const auto get = [&](uint32_t k, float* lse, PackT* pack) {
      if (k != call.rank) return receive(k, lse, pack);
      if (lse != nullptr) *lse = own_lse;
      if (pack != nullptr) *pack = own;
      return true;
    };
    float weights[kRoom];
    PackT held[kHeld]{};
    bool is_complete = true;
    for_each_part<kHeld>([&](auto k) {
      weights[k] = -INFINITY;
      if (k < ranks_of<kRoom>(call) && is_complete) is_complete = get(k, &weights[k], &held[k]);
    });
    if constexpr (kRoom > kHeld) {
#pragma unroll 1
      for (uint32_t k = kHeld; k < call.ranks && is_complete; ++k) {
        is_complete = get(k, &weights[k], nullptr);
      }
    }
    if (!is_complete) return false;
    const auto weighed = weigh<kRoom>(call, weights);

    float values[kElements];
#pragma unroll
    for (float& value : values) value = -0.0f;
    PackT last{};  // of the ranks whose row is not empty
    float weight_of_last = 1.0f;
    int taken = 0;
    const auto add = [&](float weight, const PackT& pack) {
      float of_part[kElements];
      pack.unpack(of_part);
#pragma unroll
      for (int i = 0; i < kElements; ++i) values[i] = add_product(values[i], weight, of_part[i]);
      last = pack;
      weight_of_last = weight;
      ++taken;
    };
    for_each_part<kHeld>([&](auto k) {
      if (!(weights[k] < 0.0f)) add(weights[k], held[k]);
    });
    if constexpr (kRoom > kHeld) {
#pragma unroll 1
      for (uint32_t k = kHeld; k < call.ranks; ++k) {
        PackT pack{};
        if (weights[k] < 0.0f) continue;
        if (!get(k, nullptr, &pack)) return false;
        add(weights[k], pack);
      }
    }
    // A lone rank's row byte for byte; zeros where no rank has keys.
    const bool is_as_it_was = taken <= 1 && weight_of_last == 1.0f;
    store(call, row, column, is_as_it_was ? last : PackT::pack(values));
    if (column == 0) {
      store_global(static_cast<float*>(call.out_lse.data) + row.offset(call.out_lse),
                   weighed.lse());
    }
    return true;
  }

 private:
  // Turns the LSEs into weights. More than two ranks are no pair.
  template <int kRoom>
  static __device__ auto weigh(const PeersCall& call, float (&weights)[kRoom]) {
    const auto part = [&](int k) { return weights[k]; };
    const auto weight = [&](int k) -> float& { return weights[k]; };
    constexpr const float* kNoSink = nullptr;
    if constexpr (kRoom == 2) {
      return weigh_pair_or_parts<ScalarMath<float>, float>(call.rule, 2, part, kNoSink, weight);
    } else {
      const int count = static_cast<int>(call.ranks);
      return weigh_parts<ScalarMath<float>, float>(call.rule, count, part, kNoSink, weight);
    }
  }
};

}  // namespace merge_attn_states::cuda
