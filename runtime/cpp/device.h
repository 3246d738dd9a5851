// SPDX-License-Identifier: Apache-2.0
// Where an artifact runs: allocation, copies, streams, captured steps. One class per kind, the same methods.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "artifact.h"
#include "tvm.h"

namespace gptq_compile::detail {

using Shape = std::vector<std::int64_t>;
constexpr std::int64_t kPooledAllocator = 2;  // of TVM's virtual machine

// A recorded sequence of device work that can be repeated.
class Graph {
 public:
  virtual ~Graph() = default;
  virtual void launch() = 0;
  virtual std::size_t nodes() const = 0;
};

// Rows of int32 that come back from the device without stalling it.
class Ring {
 public:
  virtual ~Ring() = default;
  // Enqueues the copy of a tensor into a row; what is enqueued next waits for it if it may overwrite the tensor.
  virtual void push(std::size_t row, const Value& tokens, bool reused) = 0;
  virtual const std::int32_t* wait(std::size_t row) = 0;  // valid until the row is pushed again
};

// The processor; every call is finished when it returns. Subclasses enqueue on a stream.
class Device {
 public:
  explicit Device(std::string arch = "") : arch_(std::move(arch)) {}
  virtual ~Device() = default;

  // Which code was chosen where an artifact has several libraries.
  const std::string& arch() const { return arch_; }

  virtual std::string description() const;
  virtual std::size_t depth() const { return 1; }              // decode steps in flight
  virtual std::int64_t prefill_tokens() const { return 512; }  // most tokens of one call of `forward`
  virtual std::vector<Value> vm_devices() const;   // (type, index, allocator) triples, the processor last
  // Bytes of KV cache that may be allocated without being asked for.
  virtual std::size_t cache_budget() const;

  Value zeros(const Shape& shape, const std::string& dtype);  // zero bits
  virtual Value weight(const Artifact& artifact, const WeightEntry& entry);
  virtual void upload(const Value& tensor, const void* source);  // the whole tensor
  virtual void download(void* target, const Value& tensor);      // and waits
  virtual void synchronize() {}
  virtual std::unique_ptr<Ring> ring(std::size_t depth, std::size_t width);
  // Records `run`; null where there are no graphs, or where the driver refuses the capture.
  virtual std::unique_ptr<Graph> capture(const std::function<void()>& run);

  // Between these two, the VM enqueues on this device's stream.
  virtual void* enter() { return nullptr; }
  virtual void leave(void* before) noexcept { static_cast<void>(before); }

  // int32 and float32 inputs of a call, in a buffer kept for this name and size: valid until the next such call.
  Value staged(const std::string& name, const std::vector<std::int32_t>& values, const Shape& shape);
  Value staged(const std::string& name, const std::vector<float>& values);
  Value staged(const std::string& name, const std::vector<std::uint8_t>& values, const Shape& shape);

 protected:
  virtual DlDevice dl_device() const { return {kCpu, 0}; }
  virtual std::shared_ptr<void> allocate(std::size_t bytes);  // zeroed, aligned to 64 bytes

 private:
  Value staged(const std::string& name, const void* values, const Shape& shape, const std::string& dtype);
  std::string arch_;
  std::vector<std::pair<std::string, Value>> staged_;
};

// Makes the device's stream the VM's while it exists.
class StreamScope {
 public:
  explicit StreamScope(Device& device) : device_(device), before_(device.enter()) {}
  ~StreamScope() { device_.leave(before_); }
  StreamScope(const StreamScope&) = delete;
  StreamScope& operator=(const StreamScope&) = delete;

 private:
  Device& device_;
  void* before_;
};

// Checks that an artifact can run here, before anything of it is loaded. `wanted` is "" (what the artifact was compiled
// for), "cpu", "cuda" or "cuda:1"; "cpu:x86-64-v3" runs the code for that processor where there are several. Returns the function that opens the device once TVM's libraries are loaded.
std::function<std::unique_ptr<Device>()> find_device(const std::string& wanted, const Manifest& manifest);

// device_cuda.cpp
std::function<std::unique_ptr<Device>()> find_cuda(int index, const Manifest& manifest);

}  // namespace gptq_compile::detail
