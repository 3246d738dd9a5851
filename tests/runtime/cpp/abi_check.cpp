// SPDX-License-Identifier: Apache-2.0
// Compiles only if runtime/cpp/tvm.h describes the same structures as the installed tvm-ffi's own headers.
#include <tvm/ffi/c_api.h>

#include <cstddef>

#include "tvm.h"

namespace detail = gptq_compile::detail;

#define SAME_SIZE(ours, theirs) \
  static_assert(sizeof(ours) == sizeof(theirs) && alignof(ours) == alignof(theirs), #theirs)
#define SAME_PLACE(ours, field, theirs, other) \
  static_assert(offsetof(ours, field) == offsetof(theirs, other), #theirs "." #other)

SAME_SIZE(detail::DlDevice, DLDevice);
SAME_SIZE(detail::DlType, DLDataType);
SAME_SIZE(detail::DlTensor, DLTensor);
SAME_PLACE(detail::DlTensor, data, DLTensor, data);
SAME_PLACE(detail::DlTensor, device, DLTensor, device);
SAME_PLACE(detail::DlTensor, ndim, DLTensor, ndim);
SAME_PLACE(detail::DlTensor, dtype, DLTensor, dtype);
SAME_PLACE(detail::DlTensor, shape, DLTensor, shape);
SAME_PLACE(detail::DlTensor, strides, DLTensor, strides);
SAME_PLACE(detail::DlTensor, byte_offset, DLTensor, byte_offset);
SAME_SIZE(detail::DlManagedTensor, DLManagedTensor);
SAME_PLACE(detail::DlManagedTensor, context, DLManagedTensor, manager_ctx);
SAME_PLACE(detail::DlManagedTensor, deleter, DLManagedTensor, deleter);
SAME_SIZE(detail::FfiObject, TVMFFIObject);
SAME_SIZE(detail::FfiAny, TVMFFIAny);
SAME_PLACE(detail::FfiAny, integer, TVMFFIAny, v_int64);
SAME_SIZE(detail::FfiBytes, TVMFFIByteArray);
SAME_PLACE(detail::FfiErrorCell, message, TVMFFIErrorCell, message);
SAME_PLACE(detail::FfiSeqCell, data, TVMFFISeqCell, data);
SAME_PLACE(detail::FfiSeqCell, size, TVMFFISeqCell, size);
SAME_SIZE(detail::FfiVersion, TVMFFIVersion);

#define SAME_NUMBER(ours, theirs) static_assert(static_cast<int>(detail::ours) == static_cast<int>(theirs), #theirs)

SAME_NUMBER(kCpu, kDLCPU);
SAME_NUMBER(kCuda, kDLCUDA);
SAME_NUMBER(kFfiNone, kTVMFFINone);
SAME_NUMBER(kFfiInt, kTVMFFIInt);
SAME_NUMBER(kFfiBool, kTVMFFIBool);
SAME_NUMBER(kFfiRawText, kTVMFFIRawStr);
SAME_NUMBER(kFfiFirstObject, kTVMFFIStaticObjectBegin);
SAME_NUMBER(kFfiFunction, kTVMFFIFunction);
SAME_NUMBER(kFfiTensor, kTVMFFITensor);
SAME_NUMBER(kFfiArray, kTVMFFIArray);
SAME_NUMBER(kFfiModule, kTVMFFIModule);
static_assert(kDLInt == 0 && kDLUInt == 1 && kDLFloat == 2 && kDLBfloat == 4 && kDLBool == 6, "type codes");
static_assert(TVM_FFI_VERSION_MAJOR == 0 && TVM_FFI_VERSION_MINOR == 1, "version");
