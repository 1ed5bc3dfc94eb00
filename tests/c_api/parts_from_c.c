/* An engine in C: merges many parts and updates a running state, on the CPU.
 *
 *     parts_from_c path/to/libmerge_attn_states.so        (torch/lib on LD_LIBRARY_PATH)
 *
 * test_states_c_api.py compiles it against the header and against a newer one: LENGTHENED has one
 * field more in each struct, SHORTENED no optional fields of a tensor.
 * Prints a line for each thing seen and ends with status 0, or says what was wrong and ends with 1.
 */
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "merge_attn_states.h"

enum { kTokens = 3, kHeads = 2, kHeadSize = 5, kParts = 3, kRows = kTokens * kHeads };
enum { kValues = kRows * kHeadSize };

static char message[300];

static void expect(int holds, const char* what) {
  printf("%s: %s\n", holds ? "ok" : "WRONG", what);
  if (!holds) {
    printf("the last message: %s\n", message);
    exit(1);
  }
}

static void* find(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  if (symbol == NULL) {
    printf("%s\n", dlerror());
    exit(1);
  }
  return symbol;
}

/* A tensor of the CPU with its sizes and strides. */
typedef struct {
  int64_t sizes[4], strides[4];
  merge_attn_states_tensor view;
} Tensor;

static void describe(Tensor* tensor, void* data, uint32_t dtype, int rank, const int64_t* sizes,
                     int64_t bytes) {
  int64_t stride = 1;
  memset(tensor, 0, sizeof(*tensor));
  for (int i = rank - 1; i >= 0; --i) {
    tensor->sizes[i] = sizes[i];
    tensor->strides[i] = stride;
    stride *= sizes[i];
  }
  tensor->view.struct_size = sizeof(tensor->view);
  tensor->view.data = data;
  tensor->view.sizes = tensor->sizes;
  tensor->view.strides = tensor->strides;
  tensor->view.rank = rank;
  tensor->view.dtype = dtype;
  tensor->view.device_type = MERGE_ATTN_STATES_CPU;
#ifndef SHORTENED
  tensor->view.memory = data;
  tensor->view.memory_bytes = bytes;
#else
  (void)bytes;
#endif
}

static const int64_t kShape[3] = {kTokens, kHeads, kHeadSize};

/* Parts [3, 2, 5] with LSEs [3, 2]: of the second one the rows of token 1 are empty by a mask, and
 * the rows of the third one are found by an index. Its rows stand in the opposite order. */
typedef struct {
  float outputs[kParts][kValues], lses[kParts][kRows], out[kValues], out_lse[kRows], sink[kHeads];
  uint8_t empty[kRows];
  int32_t index[kTokens];
  Tensor output[kParts], lse[kParts], of_out, of_out_lse, of_sink, of_empty, of_index;
  merge_attn_states_part part[kParts];
  const merge_attn_states_part* parts[kParts];
  merge_attn_states_parts_args args;
} Problem;

static void set_up(Problem* p) {
  const int64_t heads = kHeads, tokens = kTokens;
  memset(p, 0, sizeof(*p));
  for (int k = 0; k < kParts; ++k) {
    for (int i = 0; i < kValues; ++i) p->outputs[k][i] = (float)(i + 1) * (float)(1 - 2 * (k % 2));
    for (int i = 0; i < kRows; ++i) p->lses[k][i] = 0.25f * (float)i - 0.5f * (float)k;
    describe(&p->output[k], p->outputs[k], MERGE_ATTN_STATES_FLOAT32, 3, kShape,
             sizeof(p->outputs[k]));
    describe(&p->lse[k], p->lses[k], MERGE_ATTN_STATES_FLOAT32, 2, kShape, sizeof(p->lses[k]));
    p->part[k].struct_size = sizeof(p->part[k]);
    p->part[k].output = &p->output[k].view;
    p->part[k].lse = &p->lse[k].view;
    p->parts[k] = &p->part[k];
  }
  for (int i = 0; i < kValues; ++i) p->out[i] = NAN;
  for (int i = 0; i < kRows; ++i) p->out_lse[i] = NAN;
  for (int i = 0; i < kRows; ++i) p->empty[i] = i / kHeads == 1;
  for (int i = 0; i < kTokens; ++i) p->index[i] = kTokens - 1 - i;
  for (int i = 0; i < kHeads; ++i) p->sink[i] = -0.5f * (float)i;
  describe(&p->of_out, p->out, MERGE_ATTN_STATES_FLOAT32, 3, kShape, sizeof(p->out));
  describe(&p->of_out_lse, p->out_lse, MERGE_ATTN_STATES_FLOAT32, 2, kShape, sizeof(p->out_lse));
  describe(&p->of_sink, p->sink, MERGE_ATTN_STATES_FLOAT32, 1, &heads, sizeof(p->sink));
  describe(&p->of_empty, p->empty, MERGE_ATTN_STATES_BOOL, 2, kShape, sizeof(p->empty));
  describe(&p->of_index, p->index, MERGE_ATTN_STATES_INT32, 1, &tokens, sizeof(p->index));
  p->part[1].empty = &p->of_empty.view;
  p->part[2].index = &p->of_index.view;
  p->args.struct_size = sizeof(p->args);
  p->args.out = &p->of_out.view;
  p->args.out_lse = &p->of_out_lse.view;
  p->args.parts = p->parts;
  p->args.num_parts = kParts;
  p->args.sink = &p->of_sink.view;
}

static int is_close(double a, double b) { return fabs(a - b) <= 1e-6 * fmax(1, fabs(b)); }

/* What parts and sink give, in double. `inverted`: the mask tells the rows that saw keys. */
static int is_merged(const Problem* p, int inverted) {
  for (int row = 0; row < kRows; ++row) {
    const int token = row / kHeads, head = row % kHeads;
    const int own[kParts] = {row, row, (kTokens - 1 - token) * kHeads + head};
    double sum = exp(p->sink[head]), values[kHeadSize] = {0};
    for (int k = 0; k < kParts; ++k) {
      if (k == 1 && (p->empty[row] != 0) != inverted) continue;
      const double weight = exp(p->lses[k][own[k]]);
      sum += weight;
      for (int i = 0; i < kHeadSize; ++i) {
        values[i] += weight * p->outputs[k][own[k] * kHeadSize + i];
      }
    }
    if (!is_close(p->out_lse[row], log(sum))) return 0;
    for (int i = 0; i < kHeadSize; ++i) {
      if (!is_close(p->out[row * kHeadSize + i], values[i] / sum)) return 0;
    }
  }
  return 1;
}

static int is_untouched(const Problem* p) {
  for (int i = 0; i < kValues; ++i) {
    if (p->out[i] == p->out[i]) return 0;
  }
  for (int i = 0; i < kRows; ++i) {
    if (p->out_lse[i] == p->out_lse[i]) return 0;
  }
  return 1;
}

typedef merge_attn_states_status (*Merge)(const merge_attn_states_parts_args*, char*, size_t);
typedef merge_attn_states_status (*Update)(const merge_attn_states_update_args*, char*, size_t);
typedef merge_attn_states_status (*Select)(const merge_attn_states_parts_args*,
                                           merge_attn_states_selection*, char*, size_t);
typedef merge_attn_states_status (*SelectUpdate)(const merge_attn_states_update_args*,
                                                 merge_attn_states_selection*, char*, size_t);
static Merge merge;
static Update update;
static Select select_parts;
static SelectUpdate select_update;

static void refuses(const Problem* p, const char* sentence) {
  message[0] = '\0';
  const merge_attn_states_status status = merge(&p->args, message, sizeof(message));
  expect(status == MERGE_ATTN_STATES_INVALID_ARGUMENT &&
             strncmp(message, sentence, strlen(sentence)) == 0 && is_untouched(p),
         sentence);
}

static void merges_parts(void) {
  Problem p;
  merge_attn_states_selection selection;
  set_up(&p);
  memset(&selection, 'x', sizeof(selection));
  selection.struct_size = sizeof(selection);
  expect(select_parts(&p.args, &selection, message, sizeof(message)) == MERGE_ATTN_STATES_OK &&
             strcmp(selection.kernel, "cpu") == 0 && is_untouched(&p),
         "select_parts names the kernel and writes nothing");
  expect(merge(&p.args, message, sizeof(message)) == MERGE_ATTN_STATES_OK && is_merged(&p, 0),
         "parts with a mask, an index and a sink are merged");
  set_up(&p);
  p.args.invert_empty = 1;
  expect(merge(&p.args, message, sizeof(message)) == MERGE_ATTN_STATES_OK && is_merged(&p, 1),
         "a mask may tell the rows that saw keys");
  set_up(&p);
  p.args.out_lse = NULL;
  expect(merge(&p.args, NULL, 0) == MERGE_ATTN_STATES_OK && p.out_lse[0] != p.out_lse[0] &&
             p.out[0] == p.out[0],
         "the LSE may be left out");
  /* The rows in the opposite order: strides may have any sign. */
  set_up(&p);
  p.part[2].index = NULL;
  p.output[2].view.data = p.outputs[2] + (kTokens - 1) * kHeads * kHeadSize;
  p.output[2].strides[0] = -kHeads * kHeadSize;
  p.lse[2].view.data = p.lses[2] + (kTokens - 1) * kHeads;
  p.lse[2].strides[0] = -kHeads;
  expect(merge(&p.args, message, sizeof(message)) == MERGE_ATTN_STATES_OK && is_merged(&p, 0),
         "strides may be negative");
  set_up(&p);
  p.of_index.view.data = p.index + kTokens - 1;
  p.of_index.strides[0] = -1;
  for (int i = 0; i < kTokens; ++i) p.index[i] = i;
  expect(merge(&p.args, message, sizeof(message)) == MERGE_ATTN_STATES_OK && is_merged(&p, 0),
         "so may an index's");
}

static void merges_a_stack(void) {
  Problem p;
  Tensor stack, lses;
  const int64_t sizes[4] = {kParts, kTokens, kHeads, kHeadSize};
  set_up(&p);
  p.part[1].empty = p.part[2].index = NULL;
  for (int i = 0; i < kRows; ++i) p.empty[i] = 0;
  /* As if by its index: the third part's rows themselves stand in the opposite order. */
  Problem turned = p;
  for (int i = 0; i < kValues; ++i) {
    const int token = i / (kHeads * kHeadSize), rest = i % (kHeads * kHeadSize);
    turned.outputs[2][i] = p.outputs[2][(kTokens - 1 - token) * kHeads * kHeadSize + rest];
  }
  for (int i = 0; i < kRows; ++i) {
    turned.lses[2][i] = p.lses[2][(kTokens - 1 - i / kHeads) * kHeads + i % kHeads];
  }
  describe(&stack, turned.outputs, MERGE_ATTN_STATES_FLOAT32, 4, sizes, sizeof(turned.outputs));
  describe(&lses, turned.lses, MERGE_ATTN_STATES_FLOAT32, 3, sizes, sizeof(turned.lses));
  p.part[0].output = &stack.view;
  p.part[0].lse = &lses.view;
  p.args.is_stack = 1;
  p.args.num_parts = 1;
  expect(merge(&p.args, message, sizeof(message)) == MERGE_ATTN_STATES_OK && is_merged(&p, 0),
         "a stack is merged");
  p.args.stack_dim = 3;
  expect(merge(&p.args, message, sizeof(message)) == MERGE_ATTN_STATES_INVALID_ARGUMENT &&
             strcmp(message, "dim: expected a row dimension of outputs, in [0, 2], got 3") == 0,
         message);
  p.args.stack_dim = 0;
  p.part[0].empty = &p.of_empty.view;
  expect(merge(&p.args, message, sizeof(message)) == MERGE_ATTN_STATES_INVALID_ARGUMENT &&
             strncmp(message, "empty: expected none for a stack", 32) == 0,
         message);
}

static void refuses_parts(void) {
  Problem p;
  set_up(&p);
  p.lse[2].sizes[0] = kHeads;
  p.lse[2].sizes[1] = kTokens;
  refuses(&p, "lses[2]: expected shape [3, 2] = outputs[2].shape[:-1], got [2, 3]");
  set_up(&p);
  p.output[1].sizes[0] = -1;
  refuses(&p, "outputs[1]: expected sizes of 0 or more, got [-1, 2, 5]");
  set_up(&p);
  p.output[0].view.rank = -1;
  refuses(&p, "outputs[0]: expected a rank of 0 or more with its sizes and strides, got rank -1");
  set_up(&p);
  p.of_sink.view.sizes = NULL;
  refuses(&p, "sink: expected a rank of 0 or more with its sizes and strides, got rank 1 and a ");
  set_up(&p);
  p.part[1].output = NULL;
  refuses(&p, "outputs[1]: expected a tensor, got none");
  set_up(&p);
  p.part[2].lse = NULL;
  refuses(&p, "lses[2]: expected a tensor, got none");
  set_up(&p);
  p.args.out = NULL;
  refuses(&p, "out: expected a tensor, got none");
  set_up(&p);
  p.part[1].lse_base = 7;
  refuses(&p, "lse_base[1]: expected the base e or 2, got number 7");
  set_up(&p);
  p.args.out_lse_base = -1;
  refuses(&p, "out_lse_base: expected the base e or 2, got number -1");
  set_up(&p);
  p.part[2].reserved = 1;
  refuses(&p, "parts[2]: expected 0 in reserved fields");
  set_up(&p);
  p.parts[1] = NULL;
  refuses(&p, "parts[1]: expected a struct, got null");
  set_up(&p);
  p.args.parts = NULL;
  refuses(&p, "outputs: expected one part or more, got ");
  set_up(&p);
  p.args.num_parts = 0;
  refuses(&p, "outputs: expected one part or more, got 0");
  set_up(&p);
  p.args.num_parts = -5;
  refuses(&p, "outputs: expected one part or more, got ");
  set_up(&p);
  p.args.num_parts = 1025;
  refuses(&p, "outputs: expected at most 1024 parts, got 1025");
  set_up(&p);
  p.index[2] = kTokens;
  refuses(&p, "index[2]: expected rows in [0, 3) or -1, got 3 at 2");
  set_up(&p);
  p.output[1].view.device_type = 8;
  refuses(&p, "outputs[1]: expected device cpu, the device of outputs[0], got device type 8");
  set_up(&p);
  p.of_empty.view.dtype = MERGE_ATTN_STATES_DTYPE(1, 8);
  refuses(&p, "empty[1]: expected bool, got uint8");
  set_up(&p);
  p.lse[1].strides[0] = INT64_MAX;
  refuses(&p, "lses[1]: expected elements within 64-bit addresses");
#ifndef SHORTENED
  set_up(&p);
  p.of_index.view.memory_bytes = 8;
  refuses(&p, "index[2]: expected elements inside its memory of 8 bytes");
#endif
  /* Sizes that no version of a struct has. */
  const size_t sizes[3] = {0, 16, 5000};
  for (int i = 0; i < 3; ++i) {
    set_up(&p);
    p.args.struct_size = sizes[i];
    refuses(&p, "args: expected a struct_size in [");
    set_up(&p);
    p.part[1].struct_size = sizes[i];
    refuses(&p, "parts[1]: expected a struct_size in [");
    set_up(&p);
    p.lse[2].view.struct_size = sizes[i];
    refuses(&p, "lses[2]: expected a struct_size in [");
    set_up(&p);
    p.of_index.view.struct_size = sizes[i];
    refuses(&p, "index[2]: expected a struct_size in [");
  }
#ifdef LENGTHENED
  set_up(&p);
  p.args.later = 1;
  refuses(&p, "args: expected nothing behind the ");
  set_up(&p);
  p.part[1].later = 1;
  refuses(&p, "parts[1]: expected nothing behind the ");
  set_up(&p);
  p.of_empty.view.later = 1;
  refuses(&p, "empty[1]: expected nothing behind the ");
#endif
  expect(merge(NULL, message, sizeof(message)) == MERGE_ATTN_STATES_INVALID_ARGUMENT &&
             strcmp(message, "args: expected a struct, got null") == 0,
         message);
  expect(
      select_parts(&p.args, NULL, message, sizeof(message)) == MERGE_ATTN_STATES_INVALID_ARGUMENT,
      "a null selection is refused");
}

/* The first part is the state, the second one the block. */
static merge_attn_states_update_args update_of(Problem* p) {
  merge_attn_states_update_args args;
  memset(&args, 0, sizeof(args));
  args.struct_size = sizeof(args);
  args.out = &p->output[0].view;
  args.lse = &p->lse[0].view;
  args.block_out = &p->output[1].view;
  args.block_lse = &p->lse[1].view;
  return args;
}

/* Rows of the state: merged with their own number of the block, or what `before` holds. */
static int is_updated(const Problem* p, const Problem* before, const int* of_block) {
  for (int row = 0; row < kRows; ++row) {
    const int token = of_block[row / kHeads], from = token * kHeads + row % kHeads;
    const double a = before->lses[0][row], b = token < 0 ? -INFINITY : before->lses[1][from];
    const double lse = log(exp(a) + exp(b)), weight = exp(b - lse);
    if (!is_close(p->lses[0][row], lse)) return 0;
    for (int i = 0; i < kHeadSize; ++i) {
      const double own = before->outputs[0][row * kHeadSize + i];
      const double other = token < 0 ? 0 : before->outputs[1][from * kHeadSize + i];
      const double merged = (1 - weight) * own + weight * other;
      if (!is_close(p->outputs[0][row * kHeadSize + i], merged)) return 0;
    }
  }
  return 1;
}

static void refuses_update(Problem* p, const merge_attn_states_update_args* args,
                           const char* sentence) {
  Problem before = *p;
  const merge_attn_states_status status = update(args, message, sizeof(message));
  expect(status == MERGE_ATTN_STATES_INVALID_ARGUMENT &&
             strncmp(message, sentence, strlen(sentence)) == 0 &&
             memcmp(before.outputs, p->outputs, sizeof(p->outputs)) == 0 &&
             memcmp(before.lses, p->lses, sizeof(p->lses)) == 0,
         sentence);
}

static void updates(void) {
  Problem p, before;
  merge_attn_states_selection selection;
  const int all[kTokens] = {0, 1, 2}, some[kTokens] = {1, -1, 0}, masked[kTokens] = {0, -1, 2};
  set_up(&p);
  before = p;
  merge_attn_states_update_args args = update_of(&p);
  selection.struct_size = sizeof(selection);
  expect(select_update(&args, &selection, message, sizeof(message)) == MERGE_ATTN_STATES_OK &&
             strcmp(selection.kernel, "cpu") == 0 &&
             memcmp(before.outputs, p.outputs, sizeof(p.outputs)) == 0,
         "select_update names the kernel and writes nothing");
  expect(update(&args, message, sizeof(message)) == MERGE_ATTN_STATES_OK &&
             is_updated(&p, &before, all),
         "a block is merged into a state");

  set_up(&p);
  p.index[0] = 2, p.index[1] = 0, p.index[2] = -1;
  args = update_of(&p);
  args.index = &p.of_index.view;
  expect(update(&args, message, sizeof(message)) == MERGE_ATTN_STATES_OK &&
             is_updated(&p, &before, some),
         "into the rows that an index names");

  set_up(&p);
  args = update_of(&p);
  args.empty = &p.of_empty.view;
  expect(update(&args, message, sizeof(message)) == MERGE_ATTN_STATES_OK &&
             is_updated(&p, &before, masked),
         "but not rows that saw no keys");
  set_up(&p);
  args = update_of(&p);
  args.empty = &p.of_empty.view;
  args.invert_empty = 1;
  for (int i = 0; i < kRows; ++i) p.empty[i] = !p.empty[i];
  expect(update(&args, message, sizeof(message)) == MERGE_ATTN_STATES_OK &&
             is_updated(&p, &before, masked),
         "or those that a mask of the other sense leaves");

  set_up(&p);
  args = update_of(&p);
  p.lse[0].view.dtype = MERGE_ATTN_STATES_BFLOAT16;
  refuses_update(&p, &args, "lse: expected float32, the dtype of every LSE, got bfloat16");
  set_up(&p);
  args.reserved = 1;
  refuses_update(&p, &args, "args: expected 0 in reserved fields");
  args = update_of(&p);
  args.lse_base = 2;
  refuses_update(&p, &args, "lse_base: expected the base e or 2, got number 2");
  args = update_of(&p);
  args.block_lse = NULL;
  refuses_update(&p, &args, "block_lse: expected a tensor, got none");
  args = update_of(&p);
  args.index = &p.of_index.view;
  p.index[0] = -2;
  refuses_update(&p, &args, "index: expected rows in [0, 3) or -1, got -2 at 0");
  p.index[0] = 0;
  args.block_out = args.out;
  refuses_update(&p, &args, "out: expected no memory in common with block_out, got an overlap");
  args = update_of(&p);
  args.struct_size = 8;
  refuses_update(&p, &args, "args: expected a struct_size in [");
#ifdef LENGTHENED
  args = update_of(&p);
  args.later = 1;
  refuses_update(&p, &args, "args: expected nothing behind the ");
#endif
  expect(update(NULL, message, sizeof(message)) == MERGE_ATTN_STATES_INVALID_ARGUMENT &&
             strcmp(message, "args: expected a struct, got null") == 0,
         message);
}

int main(int count, char** arguments) {
  if (count != 2) return printf("usage: %s libmerge_attn_states.so\n", arguments[0]), 1;
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) return printf("%s\n", dlerror()), 1;
  *(void**)&merge = find(library, "merge_attn_states_merge_parts");
  *(void**)&update = find(library, "merge_attn_states_update");
  *(void**)&select_parts = find(library, "merge_attn_states_select_parts");
  *(void**)&select_update = find(library, "merge_attn_states_select_update");
  merges_parts();
  merges_a_stack();
  refuses_parts();
  updates();
  return 0;
}
