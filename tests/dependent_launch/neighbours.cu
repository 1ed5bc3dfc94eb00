// The neighbours that a merge may meet where everything is launched dependent: both begin as early
// as they can, and neither waits. A library for chain.py.
#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace {

// Lets the next kernel begin, and writes late.
__global__ void produce(uint32_t* to, const uint32_t* from, int64_t words) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  for (int i = 0; i < 20; ++i) __nanosleep(500);
#endif
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < words) to[i] = from[i];
}

// Writes at once.
__global__ void overwrite(uint32_t* to, int64_t words) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < words) to[i] = 0xffffffff;
}

constexpr int kThreads = 256;

template <class... Parameters>
int launch(void (*kernel)(Parameters...), int64_t words, void* stream, Parameters... parameters) {
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((words + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &dependent;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

}  // namespace

extern "C" {

int launch_produce(void* to, const void* from, int64_t words, void* stream) {
  return launch(produce, words, stream, static_cast<uint32_t*>(to),
                static_cast<const uint32_t*>(from), words);
}

int launch_overwrite(void* to, int64_t words, void* stream) {
  return launch(overwrite, words, stream, static_cast<uint32_t*>(to), words);
}

// How many kernels of a graph were launched dependent; negative: an error of CUDA.
int count_dependent(cudaGraph_t graph) {
  size_t count = 0;
  if (cudaError_t error = cudaGraphGetEdges(graph, nullptr, nullptr, nullptr, &count))
    return -error;
  std::vector<cudaGraphNode_t> from(count), to(count);
  std::vector<cudaGraphEdgeData> edges(count);
  if (cudaError_t error = cudaGraphGetEdges(graph, from.data(), to.data(), edges.data(), &count)) {
    return -error;
  }
  int dependent = 0;
  for (const cudaGraphEdgeData& edge : edges) {
    dependent += edge.type == cudaGraphDependencyTypeProgrammatic;
  }
  return dependent;
}

}  // extern "C"
