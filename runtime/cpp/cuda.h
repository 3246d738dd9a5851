// SPDX-License-Identifier: Apache-2.0
// The few functions of the CUDA driver API that the runtime needs, out of the machine's libcuda.so.1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace gptq_compile::detail::cuda {

using Pointer = std::uint64_t;  // CUdeviceptr

// The driver with checked calls. Every function throws std::runtime_error that names the call that failed.
class Driver {
 public:
  Driver();  // throws if there is no driver or no GPU

  int devices() const { return devices_; }
  std::string name(int index) const;
  std::pair<int, int> capability(int index) const;
  void* retain_context(int index) const;  // the primary one, which TVM uses too
  void use(void* context) const;          // for this thread

  Pointer allocate(std::size_t bytes) const;
  void free(Pointer pointer, void* context) const noexcept;
  void* allocate_pinned(std::size_t bytes) const;
  void free_pinned(void* pointer) const noexcept;
  std::size_t free_bytes() const;
  void clear(Pointer target, std::size_t bytes, void* stream) const;
  void upload(Pointer target, const void* source, std::size_t bytes, void* stream) const;
  void download(void* target, Pointer source, std::size_t bytes, void* stream) const;

  void* new_stream() const;
  void destroy_stream(void* stream) const noexcept;
  void synchronize(void* stream) const;
  void* new_event() const;
  void record(void* event, void* stream) const;
  void follow(void* stream, void* event) const;  // what is enqueued next on the stream waits for the event
  void wait(void* event) const;
  void destroy_event(void* event) const noexcept;

  void begin_capture(void* stream) const;
  // Ends a capture; returns the executable graph and its number of nodes.
  std::pair<void*, std::size_t> end_capture(void* stream) const;
  void abandon_capture(void* stream) const noexcept;
  void launch(void* graph, void* stream) const;
  void destroy_graph(void* graph) const noexcept;

 private:
  struct Functions;
  void check(const char* call, int status) const;
  std::string describe(int status) const;
  int ordinal(int index) const;

  const Functions* f_ = nullptr;
  int devices_ = 0;
};

// Whether machine code for any of `archs` runs on a GPU of this compute capability: sm_XY runs on the same major
// version and a minor version of Y or more, sm_XYa on exactly X.Y, compute_XY (PTX) from X.Y on (CUDA C++ Programming
// Guide, "Binary Compatibility", "PTX Compatibility").
bool runs_on(const std::vector<std::string>& archs, std::pair<int, int> capability);

}  // namespace gptq_compile::detail::cuda
