// SPDX-License-Identifier: Apache-2.0
#include "cuda.h"

#include <dlfcn.h>

#include <stdexcept>
#include <type_traits>

namespace gptq_compile::detail::cuda {

namespace {
constexpr int kNoDevice = 100, kMajorAttribute = 75, kMinorAttribute = 76;
constexpr unsigned kNonBlocking = 1, kDisableTiming = 2;
// Relaxed: a pool that grows or a module that is loaded lazily during capture is not an error of ours.
constexpr int kCaptureRelaxed = 2;
}  // namespace

struct Driver::Functions {
  int (*cuInit)(unsigned);
  int (*cuDeviceGetCount)(int*);
  int (*cuDeviceGet)(int*, int);
  int (*cuDeviceGetName)(char*, int, int);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuDevicePrimaryCtxRetain)(void**, int);
  int (*cuCtxSetCurrent)(void*);
  int (*cuMemGetInfo_v2)(std::size_t*, std::size_t*);
  int (*cuMemAlloc_v2)(Pointer*, std::size_t);
  int (*cuMemFree_v2)(Pointer);
  int (*cuMemAllocHost_v2)(void**, std::size_t);
  int (*cuMemFreeHost)(void*);
  int (*cuMemcpyHtoDAsync_v2)(Pointer, const void*, std::size_t, void*);
  int (*cuMemcpyDtoHAsync_v2)(void*, Pointer, std::size_t, void*);
  int (*cuMemsetD8Async)(Pointer, unsigned char, std::size_t, void*);
  int (*cuStreamCreate)(void**, unsigned);
  int (*cuStreamSynchronize)(void*);
  int (*cuStreamWaitEvent)(void*, void*, unsigned);
  int (*cuStreamDestroy_v2)(void*);
  int (*cuEventCreate)(void**, unsigned);
  int (*cuEventRecord)(void*, void*);
  int (*cuEventSynchronize)(void*);
  int (*cuEventDestroy_v2)(void*);
  int (*cuStreamBeginCapture_v2)(void*, int);
  int (*cuStreamEndCapture)(void*, void**);
  int (*cuGraphGetNodes)(void*, void*, std::size_t*);
  int (*cuGraphInstantiateWithFlags)(void**, void*, unsigned long long);
  int (*cuGraphLaunch)(void*, void*);
  int (*cuGraphDestroy)(void*);
  int (*cuGraphExecDestroy)(void*);
  int (*cuGetErrorString)(int, const char**);
};

Driver::Driver() {
  static Functions functions{};
  static const bool loaded = [] {
    void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) return false;
    bool all = true;
    const auto bind = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
      all = all && function != nullptr;
    };
#define GPTQ_COMPILE_BIND(name) bind(#name, functions.name)
    GPTQ_COMPILE_BIND(cuInit);
    GPTQ_COMPILE_BIND(cuDeviceGetCount);
    GPTQ_COMPILE_BIND(cuDeviceGet);
    GPTQ_COMPILE_BIND(cuDeviceGetName);
    GPTQ_COMPILE_BIND(cuDeviceGetAttribute);
    GPTQ_COMPILE_BIND(cuDevicePrimaryCtxRetain);
    GPTQ_COMPILE_BIND(cuCtxSetCurrent);
    GPTQ_COMPILE_BIND(cuMemGetInfo_v2);
    GPTQ_COMPILE_BIND(cuMemAlloc_v2);
    GPTQ_COMPILE_BIND(cuMemFree_v2);
    GPTQ_COMPILE_BIND(cuMemAllocHost_v2);
    GPTQ_COMPILE_BIND(cuMemFreeHost);
    GPTQ_COMPILE_BIND(cuMemcpyHtoDAsync_v2);
    GPTQ_COMPILE_BIND(cuMemcpyDtoHAsync_v2);
    GPTQ_COMPILE_BIND(cuMemsetD8Async);
    GPTQ_COMPILE_BIND(cuStreamCreate);
    GPTQ_COMPILE_BIND(cuStreamSynchronize);
    GPTQ_COMPILE_BIND(cuStreamWaitEvent);
    GPTQ_COMPILE_BIND(cuStreamDestroy_v2);
    GPTQ_COMPILE_BIND(cuEventCreate);
    GPTQ_COMPILE_BIND(cuEventRecord);
    GPTQ_COMPILE_BIND(cuEventSynchronize);
    GPTQ_COMPILE_BIND(cuEventDestroy_v2);
    GPTQ_COMPILE_BIND(cuStreamBeginCapture_v2);
    GPTQ_COMPILE_BIND(cuStreamEndCapture);
    GPTQ_COMPILE_BIND(cuGraphGetNodes);
    GPTQ_COMPILE_BIND(cuGraphInstantiateWithFlags);
    GPTQ_COMPILE_BIND(cuGraphLaunch);
    GPTQ_COMPILE_BIND(cuGraphDestroy);
    GPTQ_COMPILE_BIND(cuGraphExecDestroy);
    GPTQ_COMPILE_BIND(cuGetErrorString);
#undef GPTQ_COMPILE_BIND
    return all;
  }();
  const std::string way_out = " Compile the model with --target cpu to run here.";
  if (!loaded)
    throw std::runtime_error("This artifact is for CUDA, and this machine has no NVIDIA driver (libcuda.so.1)." +
                             way_out);
  f_ = &functions;
  const int status = f_->cuInit(0);
  if (status == 0) check("cuDeviceGetCount", f_->cuDeviceGetCount(&devices_));
  if (status == kNoDevice || (status == 0 && devices_ == 0))
    throw std::runtime_error("This artifact is for CUDA, and this machine's NVIDIA driver finds no GPU." + way_out);
  check("cuInit", status);
}

std::string Driver::describe(int status) const {
  const char* text = nullptr;
  f_->cuGetErrorString(status, &text);
  return std::string(text != nullptr ? text : "unknown error") + ", CUresult " + std::to_string(status);
}

void Driver::check(const char* call, int status) const {
  if (status != 0)
    throw std::runtime_error(std::string("The CUDA driver call ") + call + " failed: " + describe(status) + ".");
}

int Driver::ordinal(int index) const {
  int device = 0;
  check("cuDeviceGet", f_->cuDeviceGet(&device, index));
  return device;
}

std::string Driver::name(int index) const {
  char buffer[256] = {};
  check("cuDeviceGetName", f_->cuDeviceGetName(buffer, sizeof buffer - 1, ordinal(index)));
  return buffer;
}

std::pair<int, int> Driver::capability(int index) const {
  int major = 0, minor = 0;
  check("cuDeviceGetAttribute", f_->cuDeviceGetAttribute(&major, kMajorAttribute, ordinal(index)));
  check("cuDeviceGetAttribute", f_->cuDeviceGetAttribute(&minor, kMinorAttribute, ordinal(index)));
  return {major, minor};
}

void* Driver::retain_context(int index) const {
  void* context = nullptr;
  check("cuDevicePrimaryCtxRetain", f_->cuDevicePrimaryCtxRetain(&context, ordinal(index)));
  return context;
}

void Driver::use(void* context) const { check("cuCtxSetCurrent", f_->cuCtxSetCurrent(context)); }

Pointer Driver::allocate(std::size_t bytes) const {
  Pointer pointer = 0;
  if (f_->cuMemAlloc_v2(&pointer, bytes) != 0)
    throw std::runtime_error("The GPU has no " + std::to_string(bytes >> 20) + " MiB for a tensor: " +
                             std::to_string(free_bytes() >> 20) + " MiB are free. Give a smaller cache_tokens.");
  return pointer;
}

void Driver::free(Pointer pointer, void* context) const noexcept {
  f_->cuCtxSetCurrent(context);  // the last owner may be on a thread that never used the device
  f_->cuMemFree_v2(pointer);
}

void* Driver::allocate_pinned(std::size_t bytes) const {
  void* pointer = nullptr;
  check("cuMemAllocHost", f_->cuMemAllocHost_v2(&pointer, bytes));
  return pointer;
}

void Driver::free_pinned(void* pointer) const noexcept { f_->cuMemFreeHost(pointer); }

std::size_t Driver::free_bytes() const {
  std::size_t free = 0, total = 0;
  check("cuMemGetInfo", f_->cuMemGetInfo_v2(&free, &total));
  return free;
}

void Driver::clear(Pointer target, std::size_t bytes, void* stream) const {
  if (bytes > 0) check("cuMemsetD8Async", f_->cuMemsetD8Async(target, 0, bytes, stream));
}

void Driver::upload(Pointer target, const void* source, std::size_t bytes, void* stream) const {
  // From pageable memory the call returns once the bytes are staged, so the source may be reused at once.
  if (bytes > 0) check("cuMemcpyHtoDAsync", f_->cuMemcpyHtoDAsync_v2(target, source, bytes, stream));
}

void Driver::download(void* target, Pointer source, std::size_t bytes, void* stream) const {
  if (bytes > 0) check("cuMemcpyDtoHAsync", f_->cuMemcpyDtoHAsync_v2(target, source, bytes, stream));
}

void* Driver::new_stream() const {
  void* stream = nullptr;
  check("cuStreamCreate", f_->cuStreamCreate(&stream, kNonBlocking));
  return stream;
}

void Driver::destroy_stream(void* stream) const noexcept { f_->cuStreamDestroy_v2(stream); }

void Driver::synchronize(void* stream) const { check("cuStreamSynchronize", f_->cuStreamSynchronize(stream)); }

void* Driver::new_event() const {
  void* event = nullptr;
  check("cuEventCreate", f_->cuEventCreate(&event, kDisableTiming));
  return event;
}

void Driver::record(void* event, void* stream) const { check("cuEventRecord", f_->cuEventRecord(event, stream)); }

void Driver::follow(void* stream, void* event) const {
  check("cuStreamWaitEvent", f_->cuStreamWaitEvent(stream, event, 0));
}

void Driver::wait(void* event) const { check("cuEventSynchronize", f_->cuEventSynchronize(event)); }

void Driver::destroy_event(void* event) const noexcept { f_->cuEventDestroy_v2(event); }

void Driver::begin_capture(void* stream) const {
  check("cuStreamBeginCapture", f_->cuStreamBeginCapture_v2(stream, kCaptureRelaxed));
}

std::pair<void*, std::size_t> Driver::end_capture(void* stream) const {
  void *graph = nullptr, *executable = nullptr;
  std::size_t nodes = 0;
  check("cuStreamEndCapture", f_->cuStreamEndCapture(stream, &graph));
  const int counted = f_->cuGraphGetNodes(graph, nullptr, &nodes);
  const int made = counted == 0 ? f_->cuGraphInstantiateWithFlags(&executable, graph, 0) : 0;
  f_->cuGraphDestroy(graph);
  check("cuGraphGetNodes", counted);
  check("cuGraphInstantiate", made);
  return {executable, nodes};
}

void Driver::abandon_capture(void* stream) const noexcept {
  void* graph = nullptr;
  if (f_->cuStreamEndCapture(stream, &graph) == 0 && graph != nullptr) f_->cuGraphDestroy(graph);
}

void Driver::launch(void* graph, void* stream) const { check("cuGraphLaunch", f_->cuGraphLaunch(graph, stream)); }

void Driver::destroy_graph(void* graph) const noexcept { f_->cuGraphExecDestroy(graph); }

bool runs_on(const std::vector<std::string>& archs, std::pair<int, int> capability) {
  for (const std::string& arch : archs) {
    const bool ptx = arch.rfind("compute_", 0) == 0;
    if (!ptx && arch.rfind("sm_", 0) != 0) continue;
    std::string digits = arch.substr(arch.find('_') + 1);
    const char last = digits.empty() ? '\0' : digits.back();
    if (last == 'a' || last == 'f') digits.pop_back();
    if (digits.size() < 2 || digits.size() > 4 || digits.find_first_not_of("0123456789") != std::string::npos) continue;
    const std::pair<int, int> code(std::stoi(digits.substr(0, digits.size() - 1)), digits.back() - '0');
    if (last == 'a' ? code == capability
        : ptx       ? code <= capability
                    : code.first == capability.first && code.second <= capability.second)
      return true;
  }
  return false;
}

}  // namespace gptq_compile::detail::cuda
