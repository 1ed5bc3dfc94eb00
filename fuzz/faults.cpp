#include "faults.h"

namespace merge_attn_states::fuzz {
namespace {

constexpr uint32_t kAnyDType[] = {kF32,
                                  kF16,
                                  kBF16,
                                  kF64,
                                  kE4M3,
                                  kE5M2,
                                  0,
                                  ~0u,
                                  MERGE_ATTN_STATES_DTYPE(0, 32),
                                  MERGE_ATTN_STATES_DTYPE(2, 8),
                                  MERGE_ATTN_STATES_DTYPE(6, 8),
                                  MERGE_ATTN_STATES_DTYPE(17, 4),
                                  MERGE_ATTN_STATES_DTYPE(18, 8),
                                  kF32 & 0xffff,
                                  kF32 + (1u << 16),
                                  MERGE_ATTN_STATES_DTYPE(5, 64)};

}  // namespace

void make_odd(Operand& operand, uint8_t kind, uint8_t index, int64_t number) {
  const size_t at = operand.sizes.empty() ? 0 : index % operand.sizes.size();
  switch (kind % kFaults) {
    case 1:
      operand.given = !operand.given;
      break;
    case 2:
      operand.sizes.resize(index % 9, 1), operand.strides.resize(index % 9, 1);
      // Exactly as long as the rank, so that reading past it is seen.
      operand.sizes.shrink_to_fit(), operand.strides.shrink_to_fit();
      point_view(operand);
      break;
    case 3:
      if (!operand.sizes.empty()) operand.sizes[at] = number;
      break;
    case 4:
      if (!operand.strides.empty()) operand.strides[at] = number;
      break;
    case 5:
      if (!operand.strides.empty()) operand.strides[at] = static_cast<int8_t>(number);
      break;
    case 6:
      operand.view.dtype = pick(kAnyDType, index);
      break;
    case 7:
      operand.view.device_type = index % 20;
      break;
    case 8:
      operand.view.device_index = static_cast<int8_t>(index);
      break;
    case 9:
      operand.view.data = nullptr;
      break;
    case 10:
      operand.view.rank = static_cast<int32_t>(-1 - index);
      break;
    case 11:
      (index & 1 ? operand.view.sizes : operand.view.strides) = nullptr;
      break;
    case 12:
      operand.view.data =
          reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(operand.view.data) + number);
      break;
    case 15: {  // strides that no tensor has
      uint64_t stride = static_cast<uint64_t>(number);
      for (int64_t& each : operand.strides) each = static_cast<int8_t>(stride += index);
      break;
    }
    default:
      break;
  }
}

}  // namespace merge_attn_states::fuzz
