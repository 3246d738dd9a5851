// SPDX-License-Identifier: Apache-2.0
#include "tvm.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <stdexcept>

namespace gptq_compile::detail {

namespace {

// Functions of libtvm_ffi.so; all but the last return 0 or leave an error to be fetched.
struct Api {
  void (*version)(FfiVersion*) = nullptr;
  int (*reference)(void*) = nullptr;
  int (*dereference)(void*) = nullptr;
  int (*global)(const FfiBytes*, void**) = nullptr;
  int (*own)(const FfiAny*, FfiAny*) = nullptr;
  int (*call)(void*, FfiAny*, std::int32_t, FfiAny*) = nullptr;
  int (*from_dlpack)(DlManagedTensor*, std::int32_t, std::int32_t, void**) = nullptr;
  int (*set_stream)(std::int32_t, std::int32_t, void*, void**) = nullptr;
  void (*raised)(void**) = nullptr;
};
Api api;
std::mutex loading;
bool has_ffi = false;

constexpr std::uint32_t kMajor = 0, kMinor = 1;  // the ABI that tvm.h describes

template <typename T>
const T& cell(const void* object) {
  return *reinterpret_cast<const T*>(static_cast<const char*>(object) + sizeof(FfiObject));
}

void check(int status) {
  if (status == 0) return;
  void* error = nullptr;
  api.raised(&error);
  std::string message = "it gave no reason";
  if (error != nullptr) {
    const FfiErrorCell& raised = cell<FfiErrorCell>(error);
    message.assign(raised.message.data, raised.message.size);
    message = message.substr(0, message.find('\n'));
    api.dereference(error);
  }
  while (!message.empty() && (message.back() == '.' || message.back() == ' ')) message.pop_back();
  throw std::runtime_error("The compiled model or TVM's runtime failed: " + message + ".");
}

// Libraries stay open for the life of the process: unloading one whose functions are registered is fatal.
void* open_library(const std::string& path) {
  void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (handle == nullptr) {
    const char* reason = ::dlerror();
    throw std::runtime_error("The runtime library " + path + " does not load: " + (reason ? reason : "unknown") + ".");
  }
  return handle;
}

template <typename F>
void bind(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(::dlsym(library, name));
  if (function == nullptr)
    throw std::runtime_error(std::string("libtvm_ffi.so has no function ") + name + ". Compile the model again.");
}

void load_ffi(const std::string& path) {
  void* library = open_library(path);
  bind(library, "TVMFFIGetVersion", api.version);
  FfiVersion version{};
  api.version(&version);
  if (version.major != kMajor || version.minor != kMinor)
    throw std::runtime_error(
        path + " is tvm-ffi " + std::to_string(version.major) + "." + std::to_string(version.minor) +
        ", and this code is for 0.1. Use the C++ sources of the gptq-compile that made the artifact.");
  bind(library, "TVMFFIObjectIncRef", api.reference);
  bind(library, "TVMFFIObjectDecRef", api.dereference);
  bind(library, "TVMFFIFunctionGetGlobal", api.global);
  bind(library, "TVMFFIAnyViewToOwnedAny", api.own);
  bind(library, "TVMFFIFunctionCall", api.call);
  bind(library, "TVMFFITensorFromDLPack", api.from_dlpack);
  bind(library, "TVMFFIEnvSetStream", api.set_stream);
  bind(library, "TVMFFIErrorMoveFromRaised", api.raised);
  has_ffi = true;
}

Value global(const char* name) {
  const FfiBytes key{name, std::char_traits<char>::length(name)};
  void* found = nullptr;
  check(api.global(&key, &found));
  if (found == nullptr) return {};
  FfiAny any{kFfiFunction, 0, {0}};
  any.object = found;
  return Value::adopt(any);
}

// libtvm_runtime_cuda.so needs libcudart.so.13: the system's, the artifact's or the CUDA toolkit's.
void open_cudart(const std::string& folder) {
  const std::string name = "libcudart.so.13";
  std::vector<std::string> candidates = {name, folder + "/" + name};
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator("/usr/local", ignored))
    if (entry.path().filename().string().rfind("cuda", 0) == 0)
      candidates.push_back((entry.path() / "lib64" / name).string());
  for (const std::string& candidate : candidates)
    if (::dlopen(candidate.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr) return;
  throw std::runtime_error("The CUDA runtime library " + name +
                           " was not found. Install CUDA 13's, or set LD_LIBRARY_PATH " + "to the folder that has it.");
}

}  // namespace

Value::Value(const Value& other) : any_(other.any_) {
  if (any_.type >= kFfiFirstObject) api.reference(any_.object);
}

Value::~Value() {
  if (any_.type >= kFfiFirstObject) api.dereference(any_.object);
}

Value Value::boolean(bool value) {
  Value result(static_cast<std::int64_t>(value));
  result.any_.type = kFfiBool;
  return result;
}

Value Value::adopt(FfiAny any) {
  Value result;
  result.any_ = any;
  return result;
}

Value Value::operator()(const std::vector<Value>& arguments) const {
  if (any_.type != kFfiFunction) throw std::runtime_error("An entry of the compiled model is not a function.");
  std::vector<FfiAny> views;
  views.reserve(arguments.size());
  for (const Value& argument : arguments) views.push_back(argument.any_);
  FfiAny result{kFfiNone, 0, {0}};
  check(api.call(any_.object, views.data(), static_cast<std::int32_t>(views.size()), &result));
  return adopt(result);
}

const DlTensor& Value::tensor() const {
  if (any_.type != kFfiTensor) throw std::runtime_error("The compiled model returned something that is not a tensor.");
  return cell<DlTensor>(any_.object);
}

std::size_t Value::tensor_bytes() const {
  const DlTensor& t = tensor();
  std::size_t count = 1;
  for (std::int32_t i = 0; i < t.ndim; ++i) count *= static_cast<std::size_t>(t.shape[i]);
  return count * ((t.dtype.bits * t.dtype.lanes + 7u) / 8u);
}

std::vector<Value> Value::elements() const {
  if (any_.type != kFfiArray) throw std::runtime_error("The compiled model returned something that is not a tuple.");
  const FfiSeqCell& sequence = cell<FfiSeqCell>(any_.object);
  std::vector<Value> result;
  for (std::int64_t i = 0; i < sequence.size; ++i) {
    FfiAny owned{kFfiNone, 0, {0}};
    check(api.own(static_cast<const FfiAny*>(sequence.data) + i, &owned));
    result.push_back(adopt(owned));
  }
  return result;
}

void Tvm::load(const std::string& folder, bool cuda) {
  const std::lock_guard<std::mutex> lock(loading);
  // Threads of TVM's pool yield so often before they sleep: for 15 ms instead of 150 and more, which the end of the
  // process would wait for.
  ::setenv("TVM_THREAD_POOL_SPIN_COUNT", "30000", 0);
  if (!has_ffi) load_ffi(folder + "/libtvm_ffi.so");
  if (global("device_api.cpu").empty()) open_library(folder + "/libtvm_runtime.so");
  if (cuda && global("device_api.cuda").empty()) {
    open_cudart(folder);
    open_library(folder + "/libtvm_runtime_cuda.so");
  }
}

Value Tvm::function(const char* name) {
  Value found = global(name);
  if (found.empty())
    throw std::runtime_error(std::string("The TVM runtime in this process has no function ") + name +
                             ", so it is not the version this artifact was built with.");
  return found;
}

Value Tvm::module_function(const Value& module, const char* name) {
  return function("ffi.ModuleGetFunction")({module, name, Value::boolean(false)});
}

Value Tvm::tensor(void* data, std::shared_ptr<const void> owner, DlDevice device,
                  const std::vector<std::int64_t>& shape, const std::string& dtype) {
  struct Holder {
    DlManagedTensor managed{};
    std::vector<std::int64_t> shape, strides;
    std::shared_ptr<const void> owner;
  };
  auto holder = std::make_unique<Holder>();
  holder->shape = shape;
  holder->strides.assign(shape.size(), 1);
  for (std::size_t i = shape.size(); i > 1; --i) holder->strides[i - 2] = holder->strides[i - 1] * shape[i - 1];
  holder->owner = std::move(owner);
  holder->managed.tensor = {data,
                            device,
                            static_cast<std::int32_t>(shape.size()),
                            dl_type(dtype),
                            holder->shape.data(),
                            holder->strides.data(),
                            0};
  holder->managed.context = holder.get();
  holder->managed.deleter = [](DlManagedTensor* self) { delete static_cast<Holder*>(self->context); };
  FfiAny any{kFfiTensor, 0, {0}};
  check(api.from_dlpack(&holder->managed, 0, 0, &any.object));
  holder.release();  // its deleter frees it from now on
  return Value::adopt(any);
}

Value Tvm::array(const std::vector<Value>& elements) { return function("ffi.Array")(elements); }

void* Tvm::set_stream(DlDevice device, void* stream) {
  void* before = nullptr;
  check(api.set_stream(device.type, device.id, stream, &before));
  return before;
}

DlType dl_type(const std::string& dtype) {
  // DLDataTypeCode: int 0, uint 1, float 2, bfloat 4, bool 6.
  static const std::pair<const char*, DlType> types[] = {
      {"float32", {2, 32, 1}}, {"float16", {2, 16, 1}}, {"bfloat16", {4, 16, 1}},
      {"int64", {0, 64, 1}},   {"int32", {0, 32, 1}},   {"uint32", {1, 32, 1}},
      {"int8", {0, 8, 1}},     {"uint8", {1, 8, 1}},    {"bool", {6, 8, 1}}};
  for (const auto& [name, type] : types)
    if (dtype == name) return type;
  throw std::runtime_error("The type " + dtype + " is not one that artifacts have.");
}

}  // namespace gptq_compile::detail
