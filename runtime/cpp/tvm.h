// SPDX-License-Identifier: Apache-2.0
// The part of tvm-ffi's C ABI (version 0.1, tvm/ffi/c_api.h) and of DLPack that the runtime needs. The libraries are
// opened at run time out of the artifact's lib/, so that nothing of TVM is needed to build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace gptq_compile::detail {

// DLPack 1.x (dlpack.h).
struct DlDevice {
  std::int32_t type, id;
};
constexpr std::int32_t kCpu = 1, kCuda = 2;
struct DlType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t ndim;
  DlType dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};

// tvm/ffi/c_api.h: TVMFFIObject, TVMFFIAny, TVMFFIByteArray, TVMFFIErrorCell, TVMFFISeqCell, TVMFFITypeIndex.
struct FfiObject {
  std::uint64_t references;
  std::int32_t type;
  std::uint32_t padding;
  void (*deleter)(void*, int);
};
struct FfiAny {
  std::int32_t type;
  std::uint32_t padding;
  union {
    std::int64_t integer;
    double real;
    const char* text;
    void* object;
  };
};
struct FfiBytes {
  const char* data;
  std::size_t size;
};
struct FfiErrorCell {
  FfiBytes kind, message;
};
struct FfiSeqCell {
  void* data;
  std::int64_t size;
};
struct FfiVersion {
  std::uint32_t major, minor, patch;
};
enum FfiType : std::int32_t {
  kFfiNone = 0,
  kFfiInt = 1,
  kFfiBool = 2,
  kFfiRawText = 8,
  kFfiFirstObject = 64,
  kFfiFunction = 68,
  kFfiTensor = 70,
  kFfiArray = 71,
  kFfiModule = 73,
};

// A reference-counted value of the TVM runtime: a number, text, tensor, array, module or function.
class Value {
 public:
  Value() : any_{kFfiNone, 0, {0}} {}
  Value(std::int64_t integer) : any_{kFfiInt, 0, {integer}} {}               // NOLINT: arguments are meant to convert
  Value(const char* text) : any_{kFfiRawText, 0, {0}} { any_.text = text; }  // NOLINT; a view: for arguments only
  Value(const Value& other);
  Value(Value&& other) noexcept : any_(std::exchange(other.any_, FfiAny{kFfiNone, 0, {0}})) {}
  Value& operator=(Value other) noexcept {
    std::swap(any_, other.any_);
    return *this;
  }
  ~Value();
  static Value boolean(bool value);
  static Value adopt(FfiAny any);  // takes over a reference

  bool empty() const { return any_.type == kFfiNone; }
  std::int32_t type() const { return any_.type; }
  const FfiAny& any() const { return any_; }

  // Calls a function.
  Value operator()(const std::vector<Value>& arguments) const;
  // What a tensor is, and an array's elements.
  const DlTensor& tensor() const;
  std::size_t tensor_bytes() const;
  std::vector<Value> elements() const;

 private:
  FfiAny any_;
};

// The TVM runtime of this process. Loaded once, from the first artifact; later ones use what is there.
class Tvm {
 public:
  // Opens lib/libtvm_ffi.so and lib/libtvm_runtime.so of an artifact whose hashes have been checked, for CUDA also
  // libtvm_runtime_cuda.so and the CUDA runtime library that it needs.
  static void load(const std::string& folder, bool cuda);
  static Value function(const char* name);                              // by its registered name
  static Value module_function(const Value& module, const char* name);  // empty if there is none

  // A tensor over memory that `owner` keeps alive; `data` is a device pointer on CUDA.
  static Value tensor(void* data, std::shared_ptr<const void> owner, DlDevice device,
                      const std::vector<std::int64_t>& shape, const std::string& dtype);
  static Value array(const std::vector<Value>& elements);
  // The stream that the VM enqueues on; returns the one before.
  static void* set_stream(DlDevice device, void* stream);
};

// "float16" -> {code, bits, lanes}; throws for types that artifacts do not have.
DlType dl_type(const std::string& dtype);

}  // namespace gptq_compile::detail
