/* SPDX-License-Identifier: Apache-2.0
 *
 * The operators of domain gptq_compile (docs/onnx-ops.md) for ONNX Runtime's CPU provider. The arithmetic is in kernels
 * that TVM compiled for the linears of one model, listed in cases.inc; here they are given ONNX Runtime's tensors and
 * threads. A kernel asks four things of TVM's runtime, and this file is that runtime, so nothing else need be loaded.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <tvm/ffi/c_api.h>

#include "ort_abi.h"

enum { LANES = 16, ALIGNMENT = 64, MOST_TENSORS = 6, MOST_OUTPUTS = 16 };

/* What kernels ask of TVM's runtime. */

typedef struct {
  void *sync_handle;
  int32_t num_task;
} ParallelGroup;
typedef int (*ParallelFunction)(int task, ParallelGroup *group, void *data);

typedef struct {
  ParallelFunction function;
  void *data;
  ParallelGroup group;
  int failed;
} Launch;

static const OrtApi *api;
static __thread const OrtKernelContext *running; /* whose threads a launch uses */
static __thread char message[512];               /* what a kernel said when it refused its arguments */

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  size_t used = (size_t)snprintf(message, sizeof message, "%s: ", kind);
  for (int32_t i = 0; i < count; i++)
    if (parts[i] != NULL && used < sizeof message)
      used += (size_t)snprintf(message + used, sizeof message - used, "%s", parts[i]);
}

static void *allocate(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  return aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

static int give_back(int device_type, int device_id, void *memory) {
  (void)device_type, (void)device_id;
  free(memory);
  return 0;
}

static void run_task(void *data, size_t task) {
  Launch *launch = data;
  if (launch->function((int)task, &launch->group, launch->data) != 0)
    __atomic_store_n(&launch->failed, 1, __ATOMIC_RELAXED);
}

/* Twice as many tasks as cores: threads that are held up leave theirs to the others. */
static int launch(ParallelFunction function, void *data, int tasks) {
  static int cores;
  if (cores == 0) cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
  if (tasks <= 0) tasks = cores > 32 ? 64 : cores > 1 ? 2 * cores : 1;
  Launch all = {function, data, {NULL, tasks}, 0};
  OrtStatus *status = api->KernelContext_ParallelFor(running, run_task, (size_t)tasks, 0, &all);
  if (status != NULL) {
    api->ReleaseStatus(status);
    return -1;
  }
  return all.failed ? -1 : 0;
}

/* The places where the kernels look for the functions above. */
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);
extern int (*__TVMBackendParallelLaunch)(ParallelFunction, void *, int);

/* The linears of the model. */

typedef struct {
  int64_t in_features, out_features, bits, group_size, zeros, bias, words, groups;
  TVMFFISafeCallType one, any; /* for one row, and for any number */
} Case;

#define CASE(number, ...)                                                                        \
  extern int __tvm_ffi_quant_linear_##number##_one(void *, const TVMFFIAny *, int32_t, TVMFFIAny *); \
  extern int __tvm_ffi_quant_linear_##number##_any(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);
#include "cases.inc"
#undef CASE

static const Case CASES[] = {
#define CASE(number, ...) \
  {__VA_ARGS__, __tvm_ffi_quant_linear_##number##_one, __tvm_ffi_quant_linear_##number##_any},
#include "cases.inc"
#undef CASE
};

/* A kernel's arguments. Tensors that do not start where kernels need it are copied. */

typedef struct {
  int count;
  DLTensor tensors[MOST_TENSORS];
  int64_t shapes[MOST_TENSORS][3];
  TVMFFIAny values[MOST_TENSORS];
  void *copies[MOST_TENSORS];
} Arguments;

static int add(Arguments *all, void *data, DLDataTypeCode code, int bits, int rank, int64_t a, int64_t b, int64_t c) {
  int i = all->count++;
  int64_t dims[3] = {a, b, c};
  size_t bytes = (size_t)bits / 8;
  for (int d = 0; d < rank; d++) bytes *= (size_t)(all->shapes[i][d] = dims[d]);
  all->copies[i] = NULL;
  if ((uintptr_t)data % ALIGNMENT != 0) {
    all->copies[i] = allocate(0, 0, bytes, 0, 0);
    if (all->copies[i] == NULL) return -1;
    memcpy(all->copies[i], data, bytes);
    data = all->copies[i];
  }
  all->tensors[i] = (DLTensor){data, {kDLCPU, 0}, rank, {(uint8_t)code, (uint8_t)bits, 1}, all->shapes[i], NULL, 0};
  memset(&all->values[i], 0, sizeof all->values[i]);
  all->values[i].type_index = kTVMFFIDLTensorPtr;
  all->values[i].v_ptr = &all->tensors[i];
  return 0;
}

/* The operator QuantLinear. */

typedef struct {
  const Case *cases[2][2]; /* with zero points, with bias */
  size_t outputs;
  int64_t sizes[MOST_OUTPUTS]; /* features of each output */
} Kernel;

#define TRY(call)                              \
  do {                                         \
    OrtStatus *status_ = (call);               \
    if (status_ != NULL) return status_;       \
  } while (0)

static OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *given, const OrtKernelInfo *info, void **made) {
  (void)op, (void)given;
  int64_t in, out, bits, group;
  TRY(api->KernelInfoGetAttribute_int64(info, "in_features", &in));
  TRY(api->KernelInfoGetAttribute_int64(info, "out_features", &out));
  TRY(api->KernelInfoGetAttribute_int64(info, "bits", &bits));
  TRY(api->KernelInfoGetAttribute_int64(info, "group_size", &group));
  int64_t sizes[MOST_OUTPUTS], sum = 0;
  size_t outputs = MOST_OUTPUTS;
  TRY(api->KernelInfoGetAttributeArray_int64(info, "output_sizes", sizes, &outputs));
  for (size_t i = 0; i < outputs; i++) sum += sizes[i] > 0 ? sizes[i] : out + 1;
  if (sum != out)
    return api->CreateStatus(ORT_INVALID_GRAPH, "output_sizes of a QuantLinear do not add up to its out_features.");
  Kernel *kernel = calloc(1, sizeof *kernel);
  if (kernel == NULL) return api->CreateStatus(ORT_FAIL, "There is no memory for a kernel of QuantLinear.");
  kernel->outputs = outputs;
  memcpy(kernel->sizes, sizes, outputs * sizeof *sizes);
  int found = 0;
  for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
    const Case *c = &CASES[i];
    if (c->in_features != in || c->out_features != out || c->bits != bits || c->group_size != group) continue;
    kernel->cases[c->zeros][c->bias] = c;
    found = 1;
  }
  if (!found) {
    free(kernel);
    char text[300];
    snprintf(text, sizeof text,
             "This library of operators has no kernel for a QuantLinear of %lld to %lld features, %lld bits and groups "
             "of %lld: it was built for another model. Register the library that lies beside the model.",
             (long long)in, (long long)out, (long long)bits, (long long)group);
    return api->CreateStatus(ORT_INVALID_GRAPH, text);
  }
  *made = kernel;
  return NULL;
}

static void destroy_kernel(void *kernel) { free(kernel); }

/* Where an input's values are (NULL if it is left out) and, if asked for, its shape. */
static OrtStatus *input(const OrtKernelContext *context, size_t index, void **data, int64_t *dims, size_t *rank) {
  const OrtValue *value = NULL;
  *data = NULL;
  TRY(api->KernelContext_GetInput(context, index, &value));
  if (value == NULL) return NULL;
  TRY(api->GetTensorMutableData((OrtValue *)value, data));
  OrtTensorTypeAndShapeInfo *info;
  size_t count;
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatus *status = api->GetDimensionsCount(info, &count);
  if (status == NULL && count > *rank) status = api->CreateStatus(ORT_INVALID_ARGUMENT, "A tensor has too many axes.");
  if (status == NULL) status = api->GetDimensions(info, dims, count);
  api->ReleaseTensorTypeAndShapeInfo(info);
  *rank = count;
  return status;
}

static OrtStatus *compute_case(const Case *c, OrtKernelContext *context, void *const data[5], int64_t rows, void *out) {
  int64_t tiles = (c->out_features + LANES - 1) / LANES;
  Arguments all = {0};
  int short_of_memory = 0;
  short_of_memory |= add(&all, data[0], kDLFloat, 32, 2, rows, c->in_features, 0);
  short_of_memory |= add(&all, data[1], kDLUInt, 32, 3, tiles, c->words, LANES);
  short_of_memory |= add(&all, data[2], kDLFloat, 16, 3, tiles, c->groups, LANES);
  if (c->zeros) short_of_memory |= add(&all, data[3], kDLUInt, 8, 3, tiles, c->groups, LANES);
  if (c->bias) short_of_memory |= add(&all, data[4], kDLFloat, 32, 1, c->out_features, 0, 0);
  short_of_memory |= add(&all, out, kDLFloat, 32, 2, rows, c->out_features, 0);
  int failed = 0;
  if (!short_of_memory) {
    TVMFFIAny result;
    memset(&result, 0, sizeof result);
    message[0] = '\0';
    running = context;
    failed = (rows == 1 ? c->one : c->any)(NULL, all.values, all.count, &result);
    running = NULL;
    void *copy = all.copies[all.count - 1];
    if (copy != NULL) memcpy(out, copy, (size_t)(rows * c->out_features) * sizeof(float));
  }
  for (int i = 0; i < all.count; i++) free(all.copies[i]);
  if (short_of_memory) return api->CreateStatus(ORT_FAIL, "There is no memory to copy a tensor of QuantLinear.");
  if (failed) return api->CreateStatus(ORT_FAIL, message[0] ? message : "A kernel of QuantLinear failed.");
  return NULL;
}

static OrtStatus *compute(void *made, OrtKernelContext *context) {
  const Kernel *kernel = made;
  void *data[5];
  int64_t dims[5][8];
  size_t ranks[5];
  for (size_t i = 0; i < 5; i++) {
    ranks[i] = 8;
    TRY(input(context, i, &data[i], dims[i], &ranks[i]));
  }
  const Case *c = kernel->cases[data[3] != NULL][data[4] != NULL];
  if (c == NULL)
    return api->CreateStatus(ORT_INVALID_GRAPH,
                             "This library of operators has a QuantLinear of this shape, but not with and without the "
                             "same optional inputs. Register the library that lies beside the model.");
  int64_t tiles = (c->out_features + LANES - 1) / LANES, rows = 1;
  for (size_t d = 0; d + 1 < ranks[0]; d++) rows *= dims[0][d];
  int fits = ranks[0] >= 1 && dims[0][ranks[0] - 1] == c->in_features;
  for (size_t i = 1; i <= (c->zeros ? 3u : 2u); i++)
    fits &= ranks[i] == 3 && dims[i][0] == tiles && dims[i][1] == (i == 1 ? c->words : c->groups) && dims[i][2] == LANES;
  if (c->bias) fits &= ranks[4] == 1 && dims[4][0] == c->out_features;
  if (!fits) return api->CreateStatus(ORT_INVALID_ARGUMENT, "The shapes of QuantLinear's inputs contradict its attributes.");
  float *outs[MOST_OUTPUTS], *all;
  for (size_t i = 0; i < kernel->outputs; i++) {
    OrtValue *value;
    dims[0][ranks[0] - 1] = kernel->sizes[i];
    TRY(api->KernelContext_GetOutput(context, i, dims[0], ranks[0], &value));
    TRY(api->GetTensorMutableData(value, (void **)&outs[i]));
  }
  if (rows == 0) return NULL;
  if (kernel->outputs == 1) return compute_case(c, context, data, rows, outs[0]);
  all = allocate(0, 0, (uint64_t)(rows * c->out_features) * sizeof(float), 0, 0);
  if (all == NULL) return api->CreateStatus(ORT_FAIL, "There is no memory for the outputs of QuantLinear.");
  OrtStatus *status = compute_case(c, context, data, rows, all);
  const float *from = all;
  for (int64_t row = 0; row < rows && status == NULL; row++)
    for (size_t i = 0; i < kernel->outputs; from += kernel->sizes[i++])
      memcpy(outs[i] + row * kernel->sizes[i], from, (size_t)kernel->sizes[i] * sizeof(float));
  free(all);
  return status;
}

static const char *name(const OrtCustomOp *op) { return (void)op, "QuantLinear"; }
static const char *provider(const OrtCustomOp *op) { return (void)op, NULL; } /* the CPU */
static size_t input_count(const OrtCustomOp *op) { return (void)op, 5; }
static size_t output_count(const OrtCustomOp *op) { return (void)op, 1; }
static int output_type(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, TYPE_FLOAT; }
static int input_type(const OrtCustomOp *op, size_t index) {
  static const int types[5] = {TYPE_FLOAT, TYPE_UINT32, TYPE_FLOAT16, TYPE_UINT8, TYPE_FLOAT};
  return (void)op, types[index];
}
static int input_kind(const OrtCustomOp *op, size_t index) {
  return (void)op, index < 3 ? REQUIRED : OPTIONAL;
}
static int output_kind(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, VARIADIC; }
static int memory_kind(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, 0; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }

static const OrtCustomOp QUANT_LINEAR = {
    .version = ORT_VERSION,
    .GetName = name,
    .GetExecutionProviderType = provider,
    .GetInputType = input_type,
    .GetInputTypeCount = input_count,
    .GetOutputType = output_type,
    .GetOutputTypeCount = output_count,
    .KernelDestroy = destroy_kernel,
    .GetInputCharacteristic = input_kind,
    .GetOutputCharacteristic = output_kind,
    .GetInputMemoryType = memory_kind,
    .GetVariadicInputMinArity = one,
    .GetVariadicInputHomogeneity = one,
    .GetVariadicOutputMinArity = one,
    .GetVariadicOutputHomogeneity = one,
    .CreateKernelV2 = create_kernel,
    .KernelComputeV2 = compute,
    .GetStartVersion = one,
    .GetEndVersion = one,
};

static OrtCustomOpDomain *domain; /* one for all sessions; never released, as sessions may outlive anything here */

static OrtStatus *register_all(OrtSessionOptions *options) {
  if (domain == NULL) {
    OrtCustomOpDomain *made;
    TRY(api->CreateCustomOpDomain("gptq_compile", &made));
    OrtStatus *status = api->CustomOpDomain_Add(made, &QUANT_LINEAR);
    if (status != NULL) {
      api->ReleaseCustomOpDomain(made);
      return status;
    }
    __TVMBackendAllocWorkspace = allocate;
    __TVMBackendFreeWorkspace = give_back;
    __TVMBackendParallelLaunch = launch;
    domain = made;
  }
  return api->AddCustomOpDomain(options, domain);
}

/* What ONNX Runtime calls when it is given this library. */
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
  const OrtApi *found = base->GetApi(ORT_VERSION);
  if (found == NULL)
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "These operators need onnxruntime 1.17 or newer.");
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    return found->CreateStatus(ORT_FAIL, "These operators were compiled for CPUs with AVX2 and FMA (x86-64-v3).");
  pthread_mutex_lock(&one_at_a_time);
  api = found;
  OrtStatus *status = register_all(options);
  pthread_mutex_unlock(&one_at_a_time);
  return status;
}
