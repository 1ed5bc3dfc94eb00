// Times tiles of the vectorized kernel that tuning.h would not choose, beside the triad: where its
// numbers come from. A program of its own, without PyTorch:
//
//   nvcc -O3 -std=c++20 -fmad=false --expt-relaxed-constexpr -arch=native -Iinclude -Icsrc
//     -o build/tune benchmarks/tune.cu csrc/cuda/vectorized.cu
//   build/tune 2048 16 128 warm - 5,0,1 4,0,1 4,0,2 / 8192 64 64 cold heads-first 5,0,1x
//
// Each case is tokens, heads, head size, warm or cold, options (or -) and tiles; "/" ends it. A
// tile is token bits, head bits, packs a thread; then x: blocks walk along the tokens first.
// Options: f32, f16 (else bfloat16), fp8 (output), heads-first, padded, half (of the tokens have
// context), in-place, no-lse. Printed are microseconds and our bytes a second over the triad's,
// medians of 11 replays in turn.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "../csrc/cuda/launch.h"
#include "triad.cu"

namespace merge_attn_states::cuda {
void check(cudaError_t status, int) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}
}  // namespace merge_attn_states::cuda

namespace {

using namespace merge_attn_states;
using namespace merge_attn_states::cuda;

void check(cudaError_t status) { cuda::check(status, 0); }

// Numbers in (-3.3, 3.3); read as 16-bit ones every other is small.
__global__ void fill(float* values, int64_t count, uint32_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    uint32_t hash = (static_cast<uint32_t>(i) + seed) * 2654435761u;
    hash = (hash ^ hash >> 15) * 2246822519u;
    values[i] = static_cast<int>(hash >> 16) * 1e-4f - 3.3f;
  }
}

struct Case {
  int64_t tokens, heads, head_size;
  bool warm;
  std::string options;

  bool has(const char* option) const { return options.find(option) != std::string::npos; }
  int64_t rows() const { return tokens * heads; }
  int64_t element() const { return has("f32") ? 4 : 2; }
  int64_t width() const { return has("padded") ? head_size * 3 / 2 : head_size; }
  int64_t bytes() const {
    return rows() * (head_size * (2 * element() + (has("fp8") ? 1 : element())) + 12);
  }
  // An FP8 output's triad writes half of what it reads from each.
  int64_t triad_packs() const { return bytes() / (has("fp8") ? 40 : 48); }
};

struct Buffers {
  void *prefix, *suffix, *output, *prefix_lse, *suffix_lse, *output_lse, *a, *b, *c, *scale;

  explicit Buffers(const Case& c) {
    uint32_t seed = 0;
    const auto make = [&](void*& memory, int64_t bytes) {
      check(cudaMalloc(&memory, bytes + 16));
      fill<<<1024, 256>>>(static_cast<float*>(memory), bytes / 4, ++seed);
    };
    for (void** rows : {&prefix, &suffix, &output}) {
      make(*rows, c.rows() * c.width() * c.element());
    }
    for (void** lses : {&prefix_lse, &suffix_lse, &output_lse}) make(*lses, c.rows() * 4);
    for (void** packs : {&a, &b, &this->c}) make(*packs, c.triad_packs() * 16);
    make(scale, 4);
  }
  void free() {
    for (void* memory :
         {prefix, suffix, output, prefix_lse, suffix_lse, output_lse, a, b, c, scale}) {
      check(cudaFree(memory));
    }
  }
};

MergeArgs args_of(const Case& c, const Buffers& buffers, cudaStream_t stream) {
  const auto rows = [&](void* data, int64_t width) {
    return c.has("heads-first") ? Rows{data, width, width * c.tokens, 1}
                                : Rows{data, width * c.heads, width, 1};
  };
  const DType input = c.has("f32")   ? DType::kFloat32
                      : c.has("f16") ? DType::kFloat16
                                     : DType::kBFloat16;
  const bool in_place = c.has("in-place");
  return {.num_tokens = c.tokens,
          .num_heads = c.heads,
          .head_size = c.head_size,
          .num_tokens_with_context = c.has("half") ? c.tokens / 2 : c.tokens,
          .output = in_place ? rows(buffers.suffix, c.width()) : rows(buffers.output, c.head_size),
          .prefix_output = rows(buffers.prefix, c.width()),
          .suffix_output = rows(buffers.suffix, c.width()),
          .prefix_lse = {buffers.prefix_lse, c.tokens, 1},
          .suffix_lse = {buffers.suffix_lse, c.tokens, 1},
          .output_lse = {c.has("no-lse") ? nullptr : buffers.output_lse, c.tokens, 1},
          .output_scale = c.has("fp8") ? static_cast<const float*>(buffers.scale) : nullptr,
          .input_dtype = input,
          .output_dtype = c.has("fp8") ? DType::kFloat8E4M3 : input,
          .device_type = MERGE_ATTN_STATES_CUDA,
          .device_index = 0,
          .stream = stream};
}

Tile tile_of(const Case& c, const std::string& text) {
  Tile tile{};
  if (std::sscanf(text.c_str(), "%d,%d,%d", &tile.token_bits, &tile.head_bits,
                  &tile.packs_a_thread) != 3) {
    std::fprintf(stderr, "%s: expected token bits,head bits,packs a thread\n", text.c_str());
    std::exit(1);
  }
  const int64_t packs = c.head_size * c.element() / 16 * tile.rows() / tile.packs_a_thread;
  tile.threads = static_cast<int>(std::min<int64_t>((packs + 31) / 32 * 32, kMaxThreads));
  tile.tokens_first = text.find('x') != std::string::npos;
  return tile;
}

struct Provider {
  std::string name;
  std::function<void(const Buffers&)> call;
  cudaGraphExec_t graph = nullptr;
  std::vector<float> times{};
};

void run(const Case& c, const std::vector<std::string>& tiles) {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  const int64_t sets = c.warm ? 1 : std::max<int64_t>(2, 2 * device.l2CacheSize / c.bytes() + 2);
  std::vector<Buffers> buffers;
  for (int64_t i = 0; i < sets; ++i) buffers.emplace_back(c);
  check(cudaDeviceSynchronize());

  std::vector<Provider> providers{{"triad", [&](const Buffers& set) {
                                     triad_launch(set.a, set.b, set.c, c.triad_packs(),
                                                  c.has("fp8"), stream);
                                   }}};
  for (const std::string& text : tiles) {
    providers.push_back({text, [&c, stream, tile = tile_of(c, text)](const Buffers& set) {
                           launch_vectorized(args_of(c, set, stream), tile, true);
                         }});
  }
  const int64_t passes =
      std::max<int64_t>(1, static_cast<int64_t>(8e-4 / (c.bytes() / 3e12 + 1e-6)) / sets);
  for (Provider& provider : providers) {
    cudaGraph_t graph;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int64_t i = 0; i < passes * sets; ++i) provider.call(buffers[i % sets]);
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&provider.graph, graph, 0));
    check(cudaGraphDestroy(graph));
  }
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (int round = 0; round < 13; ++round) {
    for (Provider& provider : providers) {
      float milliseconds;
      check(cudaEventRecord(begin, stream));
      check(cudaGraphLaunch(provider.graph, stream));
      check(cudaEventRecord(end, stream));
      check(cudaEventSynchronize(end));
      check(cudaEventElapsedTime(&milliseconds, begin, end));
      if (round >= 2) provider.times.push_back(1e3f * milliseconds / (passes * sets));
    }
  }
  const auto median = [](Provider& provider) {
    std::sort(provider.times.begin(), provider.times.end());
    return provider.times[provider.times.size() / 2];
  };
  const float limit = median(providers[0]);
  std::printf("%ldx%ldx%ld %s %s: triad %.2f us", c.tokens, c.heads, c.head_size,
              c.warm ? "warm" : "cold", c.options.c_str(), limit);
  for (size_t i = 1; i < providers.size(); ++i) {
    const float time = median(providers[i]);
    std::printf("  %s %.2f = %.3f", providers[i].name.c_str(), time, limit / time);
  }
  std::printf("\n");
  for (Provider& provider : providers) check(cudaGraphExecDestroy(provider.graph));
  for (Buffers& set : buffers) set.free();
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> words;
  for (int i = 1; i <= count; ++i) {
    if (i < count && std::string_view(arguments[i]) != "/") {
      words.emplace_back(arguments[i]);
      continue;
    }
    if (words.size() >= 6) {
      const auto number = [&](int at) { return std::atoll(words[at].c_str()); };
      run({number(0), number(1), number(2), words[3] == "warm", words[4]},
          {words.begin() + 5, words.end()});
    }
    words.clear();
  }
}
