/* SPDX-License-Identifier: Apache-2.0
 *
 * The part of ONNX Runtime's C interface that a library of operators needs.
 *
 * The wheels of onnxruntime have no headers, and an export should compile wherever there is a C compiler. The interface
 * is a table of functions whose order never changes: new ones are only appended. So a table with the places between the
 * functions used here left blank is the same table. Places are those of version 17 (onnxruntime 1.17), the first with
 * KernelContext_ParallelFor.
 */
#ifndef GPTQ_COMPILE_ORT_ABI_H
#define GPTQ_COMPILE_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

enum { ORT_VERSION = 17 };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_INVALID_GRAPH = 10 }; /* OrtErrorCode */
enum { TYPE_FLOAT = 1, TYPE_UINT8 = 2, TYPE_FLOAT16 = 10, TYPE_UINT32 = 12 }; /* ONNXTensorElementDataType */
enum { REQUIRED = 0, OPTIONAL = 1, VARIADIC = 2 }; /* OrtCustomOpInputOutputCharacteristic */

typedef struct OrtStatus OrtStatus;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtCustomOp OrtCustomOp;

/* BLANK(a, b): the functions from place a to place b, both included, which are not used. */
#define BLANK(a, b) void *blank_##a[b - a + 1];

typedef struct OrtApi {
  OrtStatus *(*CreateStatus)(int code, const char *message);                                   /* 0 */
  BLANK(1, 25)
  OrtStatus *(*CreateCustomOpDomain)(const char *domain, OrtCustomOpDomain **out);             /* 26 */
  OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const OrtCustomOp *op);          /* 27 */
  OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain);      /* 28 */
  BLANK(29, 50)
  OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **out);                             /* 51 */
  BLANK(52, 60)
  OrtStatus *(*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *info, size_t *out);        /* 61 */
  OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *info, int64_t *out, size_t n);  /* 62 */
  BLANK(63, 64)
  OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtTensorTypeAndShapeInfo **out); /* 65 */
  BLANK(66, 85)
  OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *info, const char *name, int64_t *out); /* 86 */
  BLANK(87, 89)
  OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t index, const OrtValue **out); /* 90 */
  OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t index, const int64_t *dims, size_t count,
                                        OrtValue **out);                                       /* 91 */
  BLANK(92, 92)
  void (*ReleaseStatus)(OrtStatus *status);                                                    /* 93 */
  BLANK(94, 98)
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *info);                      /* 99 */
  BLANK(100, 100)
  void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *domain);                                    /* 101 */
  BLANK(102, 162)
  OrtStatus *(*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo *info, const char *name, int64_t *out,
                                                  size_t *count);                              /* 163 */
  BLANK(164, 273)
  OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context, void (*function)(void *, size_t),
                                          size_t total, size_t batches, void *data);           /* 274 */
} OrtApi;

_Static_assert(offsetof(OrtApi, GetTensorMutableData) == 51 * sizeof(void *), "place of GetTensorMutableData");
_Static_assert(offsetof(OrtApi, KernelContext_GetInput) == 90 * sizeof(void *), "place of KernelContext_GetInput");
_Static_assert(offsetof(OrtApi, ReleaseCustomOpDomain) == 101 * sizeof(void *), "place of ReleaseCustomOpDomain");
_Static_assert(offsetof(OrtApi, KernelContext_ParallelFor) == 274 * sizeof(void *), "place of ParallelFor");

typedef struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version); /* NULL if the runtime is older */
  const char *(*GetVersionString)(void);
} OrtApiBase;

/* What the runtime asks of an operator; the functions may be called by several threads. */
struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
  const char *(*GetName)(const OrtCustomOp *op);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *op);
  int (*GetInputType)(const OrtCustomOp *op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp *op);
  int (*GetOutputType)(const OrtCustomOp *op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *op);
  void (*KernelCompute)(void *kernel, OrtKernelContext *context);
  void (*KernelDestroy)(void *kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp *op, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp *op, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp *op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
  OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *op, OrtShapeInferContext *context);
  int (*GetStartVersion)(const OrtCustomOp *op);
  int (*GetEndVersion)(const OrtCustomOp *op);
};

#endif
