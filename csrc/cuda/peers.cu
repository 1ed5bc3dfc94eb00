// The kernels of a merge across ranks, by lines or in bulk (peers.cuh), and their launch.
#include "families.h"
#include "launch.h"
#include "peers.cuh"
#include "tuning.h"

namespace merge_attn_states::cuda {
namespace {

static_assert(kPeerSizes.chunk_packs <= kMostPacks);

enum class Way { kLines, kBulk, kReading };

template <class T, int kRoom, Way kWay>
__global__ void __launch_bounds__(kPeerThreads, kPeerBlocksAMultiprocessor)
    merge_peers(const __grid_constant__ PeersCall call) {
  wait_for_previous();
  if constexpr (kWay == Way::kLines) {
    merge_by_lines<T, kRoom>(call);
  } else {
    merge_in_bulk<T, kRoom, kWay == Way::kReading>(call);
  }
}

}  // namespace

void launch_peers(const RanksCall& call) {
  bool by_lines;
  const PeersCall parameters = peers_call(call, kPeerSizes, by_lines);
  const int64_t row_packs = parameters.row_packs;
  const int64_t of_lines = std::max(kPeerSizes.line_threads, (row_packs + 31) / 32 * 32);
  const int64_t blocks = parameters.num_blocks;
  const Grid grid{.blocks = by_lines ? blocks : std::min(blocks, kPeerSizes.blocks),
                  .threads = static_cast<int>(by_lines ? of_lines : kPeerSizes.chunk_threads)};
  dispatch_floats(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch_of = [&]<int kRoom>() {
      const auto& chosen = by_lines            ? kernel<merge_peers<T, kRoom, Way::kLines>>()
                           : call.is_in_buffer ? kernel<merge_peers<T, kRoom, Way::kReading>>()
                                               : kernel<merge_peers<T, kRoom, Way::kBulk>>();
      launch(chosen, grid, call, parameters);
    };
    call.ranks == 2 ? launch_of.template operator()<2>()
                    : launch_of.template operator()<kMaxPeers>();
  });
}

}  // namespace merge_attn_states::cuda
