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
};

// A pack of a row, 16 bytes.
struct MergedPack {
  MergedRow row;
  uint32_t column;
};

// The merge of a pack, of all ranks in their order. receive(k, lse, pack) gets what is not null of
// another rank's, and is false where this rank has given up. Few ranks' packs are under way before
// the first is used; of more, the others come one by one once all are weighed.
template <class T, int kRoom>
class PackMerge {
  static constexpr bool kIsPair = kRoom == 2;
  static constexpr int kHeld = kIsPair ? 2 : kHeldRanks;
  static constexpr int kElements = Rows<T>::kElements;
  using PackT = typename Rows<T>::PackT;

 public:
  // False where this rank has given up.
  template <class Receive>
  static __device__ bool merge(const PeersCall& call, const MergedPack& at, Receive receive) {
    PackMerge states;
    states.take_own(call, at);
    return states.take_others(call, receive) && states.store(call, at, receive);
  }

 private:
  __device__ void take_own(const PeersCall& call, const MergedPack& at) {
    own_ = Rows<T>::load(call, at.row, first_head(call, call.rank), at.column);
    own_lse_ = lse_of(call, at.row, first_head(call, call.rank));
  }
  template <class Receive>
  __device__ bool take_others(const PeersCall& call, Receive receive) {
    if constexpr (kIsPair) return receive(1 - call.rank, &lses_[0], &packs_[0]);
    bool is_complete = true;
    for_each_part<kHeld>([&](auto of) {
      constexpr uint32_t k = of;
      if (k >= call.ranks || k == call.rank || !is_complete) return;
      is_complete = receive(k, &lses_[place(k)], &packs_[place(k)]);
    });
#pragma unroll 1
    for (uint32_t k = kHeld; k < call.ranks && is_complete; ++k) {
      if (k != call.rank) is_complete = receive(k, &lses_[place(k)], nullptr);
    }
    return is_complete;
  }
  template <class Receive>
  __device__ bool store(const PeersCall& call, const MergedPack& at, Receive receive) {
    float weights[kRoom];
    const auto weighed = weigh(call, weights);
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
    for_each_part<kHeld>([&](auto of) {
      constexpr uint32_t k = of;
      PackT pack = packs_[place(k)];
      if (k == call.rank) pack = own_;
      if (k < ranks_of<kRoom>(call) && !(weights[k] < 0.0f)) add(weights[k], pack);
    });
    if constexpr (!kIsPair) {
#pragma unroll 1
      for (uint32_t k = kHeld; k < call.ranks; ++k) {
        PackT pack = own_;
        if (weights[k] < 0.0f) continue;
        if (k != call.rank && !receive(k, nullptr, &pack)) return false;
        add(weights[k], pack);
      }
    }
    // A lone rank's row byte for byte; zeros where no rank has keys.
    const bool is_as_it_was = taken <= 1 && weight_of_last == 1.0f;
    Rows<T>::store(call, at.row, at.column, is_as_it_was ? last : PackT::pack(values));
    if (at.column == 0 && call.out_lse.data != nullptr) {
      store_global(static_cast<float*>(call.out_lse.data) + at.row.offset(call.out_lse),
                   weighed.lse());
    }
    return true;
  }

  // Where what rank k sends is kept. Of two there is one.
  static __device__ constexpr uint32_t place(uint32_t k) { return kIsPair ? 0 : k; }

  // More than two ranks are no pair.
  __device__ auto weigh(const PeersCall& call, float (&weights)[kRoom]) const {
    const auto part = [&](uint32_t k) {
      const float theirs = lses_[place(k)];
      return k == call.rank ? own_lse_ : theirs;
    };
    const auto weight = [&](int k) -> float& { return weights[k]; };
    const int count = static_cast<int>(ranks_of<kRoom>(call));
    constexpr const float* kNoSink = nullptr;
    if constexpr (kIsPair) {
      return weigh_pair_or_parts<ScalarMath<float>, float>(call.rule, count, part, kNoSink, weight);
    } else {
      return weigh_parts<ScalarMath<float>, float>(call.rule, count, part, kNoSink, weight);
    }
  }

  PackT own_, packs_[kIsPair ? 1 : kHeld];
  float own_lse_, lses_[kIsPair ? 1 : kRoom];
};

}  // namespace merge_attn_states::cuda
