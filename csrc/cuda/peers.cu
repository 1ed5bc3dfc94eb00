// The kernels of a merge across ranks, by lines or in bulk (peers.cuh), and their launch.
#include "families.h"
#include "launch.h"
#include "peers.cuh"
#include "tuning.h"

namespace merge_attn_states::cuda {
namespace {

static_assert(kPeerSizes.chunk_packs <= kMostPacks);

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
  const PeersLaunch made = peers_launch(call, kPeerSizes);
  const Grid grid{.blocks = made.blocks, .threads = static_cast<int>(made.threads)};
  dispatch_floats(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch_of = [&]<int kRoom>() {
      const auto& chosen = made.way == Way::kLines ? kernel<merge_peers<T, kRoom, Way::kLines>>()
                           : made.way == Way::kBulk
                               ? kernel<merge_peers<T, kRoom, Way::kBulk>>()
                               : kernel<merge_peers<T, kRoom, Way::kReading>>();
      launch(chosen, grid, call, made.call);
    };
    call.ranks == 2 ? launch_of.template operator()<2>()
                    : launch_of.template operator()<kMaxPeers>();
  });
}

}  // namespace merge_attn_states::cuda
