// The C entry: merge attention states without Python and without a Torch header.
//
// An engine that links or dlopens libmerge_attn_states.so fills merge_attn_states_args and calls
// merge_attn_states_merge for two parts in vLLM's layout; for any number of parts in any layout it
// fills merge_attn_states_parts_args and calls merge_attn_states_merge_parts, and for a running
// state merge_attn_states_update_args and merge_attn_states_update. Nothing here throws, prints,
// allocates device memory or synchronises: a status comes back, and with it a message that names
// the argument. The operation, its rules and its tables are described in docs/design.md and
// README.md.
//
// Every struct begins with its size, which the caller sets to sizeof of the struct. Later versions
// add fields at the end and read those that an older caller does not have as 0, so a program that
// was compiled against this header runs with every later library. No struct exceeds 4096 bytes.
//
// The library takes its CPU threads from libtorch, so torch/lib must be on the loader's path.
#ifndef MERGE_ATTN_STATES_H_
#define MERGE_ATTN_STATES_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#define MERGE_ATTN_STATES_NOEXCEPT noexcept
#else
#define MERGE_ATTN_STATES_NOEXCEPT
#endif

#if defined(__GNUC__)
#define MERGE_ATTN_STATES_API __attribute__((visibility("default")))
#else
#define MERGE_ATTN_STATES_API
#endif

// A dtype is a DLDataType of DLPack read as one little-endian word: code | bits << 8 | lanes << 16.
// Every DLPack dtype can be passed; one that is not listed here is refused with its name.
#define MERGE_ATTN_STATES_DTYPE(code, bits) \
  ((uint32_t)(code) | ((uint32_t)(bits) << 8) | ((uint32_t)1 << 16))
#define MERGE_ATTN_STATES_INT32 MERGE_ATTN_STATES_DTYPE(0, 32)
#define MERGE_ATTN_STATES_INT64 MERGE_ATTN_STATES_DTYPE(0, 64)
#define MERGE_ATTN_STATES_BOOL MERGE_ATTN_STATES_DTYPE(6, 8)
#define MERGE_ATTN_STATES_FLOAT16 MERGE_ATTN_STATES_DTYPE(2, 16)
#define MERGE_ATTN_STATES_FLOAT32 MERGE_ATTN_STATES_DTYPE(2, 32)
#define MERGE_ATTN_STATES_FLOAT64 MERGE_ATTN_STATES_DTYPE(2, 64)
#define MERGE_ATTN_STATES_BFLOAT16 MERGE_ATTN_STATES_DTYPE(4, 16)
#define MERGE_ATTN_STATES_FLOAT8_E4M3FN MERGE_ATTN_STATES_DTYPE(10, 8)
#define MERGE_ATTN_STATES_FLOAT8_E5M2 MERGE_ATTN_STATES_DTYPE(12, 8)

// Device types are DLPack's too.
#define MERGE_ATTN_STATES_CPU 1
#define MERGE_ATTN_STATES_CUDA 2

// One operand. The arrays are borrowed for the call.
typedef struct merge_attn_states_tensor {
  size_t struct_size;      // sizeof(merge_attn_states_tensor)
  void* data;              // element [0, 0, ...]; inputs are only read
  const int64_t* sizes;    // [rank]
  const int64_t* strides;  // [rank], in elements; any sign
  int32_t rank;
  uint32_t dtype;
  int32_t device_type;
  int32_t device_index;  // of a CUDA device
  const void* memory;    // where the memory that holds the operand begins
  int64_t memory_bytes;  // its size; 0 = unknown. Where known, an element outside is refused.
} merge_attn_states_tensor;

// N = num_tokens, H = num_heads, D = head_size. A null pointer means "not given".
typedef struct merge_attn_states_args {
  size_t struct_size;                             // sizeof(merge_attn_states_args)
  const merge_attn_states_tensor* output;         // [N, H, D], written
  const merge_attn_states_tensor* prefix_output;  // [N, H, D]
  const merge_attn_states_tensor* prefix_lse;     // [H, N], natural log
  const merge_attn_states_tensor* suffix_output;  // [N, H, D]
  const merge_attn_states_tensor* suffix_lse;     // [H, N], natural log
  const merge_attn_states_tensor* output_lse;     // [H, N], written; may be null
  const merge_attn_states_tensor* output_scale;   // one float32; may be null
  void* stream;                                   // cudaStream_t of the output's device; CPU: null
  int64_t prefill_tokens_with_context;            // in [0, N]; tokens from here on copy the suffix
  int32_t has_prefill_tokens_with_context;        // 0: every token is merged
  int32_t dependent_launch;  // 1: as MERGE_ATTN_STATES_PDL=1 does for all calls
} merge_attn_states_args;

// To which base an LSE is a logarithm.
typedef enum merge_attn_states_base {
  MERGE_ATTN_STATES_BASE_E = 0,
  MERGE_ATTN_STATES_BASE_2 = 1,
} merge_attn_states_base;

// One of many parts. *rows are one to four dimensions, and D = head_size.
typedef struct merge_attn_states_part {
  size_t struct_size;                      // sizeof(merge_attn_states_part)
  const merge_attn_states_tensor* output;  // [*rows, D]
  const merge_attn_states_tensor* lse;     // [*rows] or [*rows, 1]
  // bool, shaped as the LSE: rows that saw no keys, whatever their LSE says; may be null
  const merge_attn_states_tensor* empty;
  // int32 or int64 [N], of two row dimensions: row n of the merge takes row index[n] of this part,
  // which is absent where that is -1; may be null
  const merge_attn_states_tensor* index;
  int32_t lse_base;  // merge_attn_states_base
  int32_t reserved;  // 0
} merge_attn_states_part;

// Any number of parts. Their dtypes are float32, float16 and bfloat16, mixed freely; or float64; or
// one FP8 format. An LSE is float32, of float64 outputs float64.
typedef struct merge_attn_states_parts_args {
  size_t struct_size;                          // sizeof(merge_attn_states_parts_args)
  const merge_attn_states_tensor* out;         // [*rows, D], written; may be exactly one part
  const merge_attn_states_tensor* out_lse;     // [*rows] or [*rows, 1], written; may be null
  const merge_attn_states_part* const* parts;  // [num_parts]
  int32_t num_parts;
  int32_t out_lse_base;  // merge_attn_states_base, of out_lse and of the sink
  // A stack: parts[0] alone, whose output and LSE have the parts along stack_dim.
  int32_t is_stack;
  int32_t stack_dim;
  const merge_attn_states_tensor* sink;       // [H], the last row dimension; may be null
  const merge_attn_states_tensor* out_scale;  // one float32, of an FP8 out; may be null
  void* stream;                               // cudaStream_t of the device of out; CPU: null
  int32_t invert_empty;                       // 1: `empty` tells the rows that saw keys
  int32_t dependent_launch;                   // 1: as MERGE_ATTN_STATES_PDL=1 does for all calls
} merge_attn_states_parts_args;

// A running state and a block: the state becomes the merge of the two, in place.
typedef struct merge_attn_states_update_args {
  size_t struct_size;                         // sizeof(merge_attn_states_update_args)
  const merge_attn_states_tensor* out;        // [*rows, D], read and written
  const merge_attn_states_tensor* lse;        // [*rows] or [*rows, 1], read and written
  const merge_attn_states_tensor* block_out;  // [*rows, D], or with an index [T, H, D]
  const merge_attn_states_tensor* block_lse;
  // int32 or int64 [T]: row t of the block is merged into row index[t] of the state, and skipped
  // where that is -1; of a row that several are merged into, nothing is promised; may be null
  const merge_attn_states_tensor* index;
  const merge_attn_states_tensor* empty;  // bool, shaped as block_lse; may be null
  void* stream;
  int32_t lse_base;      // merge_attn_states_base, of both
  int32_t invert_empty;  // 1: `empty` tells the rows that saw keys
  int32_t dependent_launch;
  int32_t reserved;  // 0
} merge_attn_states_update_args;

// The gradients of a merge, from those of its results. All that is written is contiguous.
typedef struct merge_attn_states_backward_args {
  size_t struct_size;                            // sizeof(merge_attn_states_backward_args)
  const merge_attn_states_parts_args* forward;   // the merge; its out, out_lse and out_scale unread
  const merge_attn_states_tensor* grad_out;      // [*rows, D]
  const merge_attn_states_tensor* grad_out_lse;  // [*rows] or [*rows, 1]; may be null
  // [num_parts, *rows, D] in the parts' dtype, float32 where they differ; may be null. Of a part
  // with an index, row n is what row n of the merge gives to the part's row index[n].
  const merge_attn_states_tensor* grad_outputs;
  const merge_attn_states_tensor* grad_lses;  // [num_parts, *rows]; may be null
  const merge_attn_states_tensor* grad_sink;  // [*rows]: of each row, to be summed; may be null
} merge_attn_states_backward_args;

typedef enum merge_attn_states_status {
  MERGE_ATTN_STATES_OK = 0,
  MERGE_ATTN_STATES_INVALID_ARGUMENT = 1,  // the message names the argument; nothing was written
  MERGE_ATTN_STATES_UNAVAILABLE = 2,       // this build or machine lacks what the call needs
  MERGE_ATTN_STATES_CUDA_ERROR = 3,        // the CUDA runtime refused the launch
  MERGE_ATTN_STATES_INTERNAL_ERROR = 4,    // no memory, or a bug of this library
} merge_attn_states_status;

// Filled by merge_attn_states_select, which reads struct_size alone; what a newer caller's struct
// holds beyond this library's becomes 0.
typedef struct merge_attn_states_selection {
  size_t struct_size;  // sizeof(merge_attn_states_selection)
  char kernel[16];     // "cpu", "vectorized" or "generic"
  char variant[64];    // what tuning chose inside that kernel
} merge_attn_states_selection;

// Merges. On any status but OK a sentence is written to message (cut at message_size, always
// terminated; message may be null when message_size is 0).
MERGE_ATTN_STATES_API merge_attn_states_status
merge_attn_states_merge(const merge_attn_states_args* args, char* message,
                        size_t message_size) MERGE_ATTN_STATES_NOEXCEPT;

// Validates the same arguments in the same way and tells which kernel would run; writes nothing.
MERGE_ATTN_STATES_API merge_attn_states_status
merge_attn_states_select(const merge_attn_states_args* args, merge_attn_states_selection* selection,
                         char* message, size_t message_size) MERGE_ATTN_STATES_NOEXCEPT;

// The same of many parts, and of a running state.
MERGE_ATTN_STATES_API merge_attn_states_status
merge_attn_states_merge_parts(const merge_attn_states_parts_args* args, char* message,
                              size_t message_size) MERGE_ATTN_STATES_NOEXCEPT;
MERGE_ATTN_STATES_API merge_attn_states_status merge_attn_states_select_parts(
    const merge_attn_states_parts_args* args, merge_attn_states_selection* selection, char* message,
    size_t message_size) MERGE_ATTN_STATES_NOEXCEPT;
MERGE_ATTN_STATES_API merge_attn_states_status
merge_attn_states_update(const merge_attn_states_update_args* args, char* message,
                         size_t message_size) MERGE_ATTN_STATES_NOEXCEPT;
MERGE_ATTN_STATES_API merge_attn_states_status merge_attn_states_select_update(
    const merge_attn_states_update_args* args, merge_attn_states_selection* selection,
    char* message, size_t message_size) MERGE_ATTN_STATES_NOEXCEPT;

// Writes the gradients of a merge.
MERGE_ATTN_STATES_API merge_attn_states_status
merge_attn_states_backward(const merge_attn_states_backward_args* args, char* message,
                           size_t message_size) MERGE_ATTN_STATES_NOEXCEPT;

// What this library was built from and with: one JSON object, UTF-8, alive as long as the library.
// Keys: version, commit, torch, compiler, cuda (toolkit version or null), architectures (as built,
// spaced), cpu (the instruction set chosen on this machine, or why there is none).
MERGE_ATTN_STATES_API const char* merge_attn_states_build_info(void) MERGE_ATTN_STATES_NOEXCEPT;

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // MERGE_ATTN_STATES_H_
