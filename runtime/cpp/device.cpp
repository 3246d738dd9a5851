// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "processor.h"

namespace gptq_compile::detail {

namespace {

constexpr std::size_t kAlignment = 64;  // bytes; generated code may assume it of every tensor
constexpr std::size_t kCacheBudget = std::size_t{1} << 30;

class CpuRing : public Ring {
 public:
  CpuRing(std::size_t depth, std::size_t width) : width_(width), rows_(depth * width) {}
  void push(std::size_t row, const Value& tokens, bool) override {
    std::memcpy(rows_.data() + row * width_, tokens.tensor().data, width_ * sizeof(std::int32_t));
  }
  const std::int32_t* wait(std::size_t row) override { return rows_.data() + row * width_; }

 private:
  std::size_t width_;
  std::vector<std::int32_t> rows_;
};

}  // namespace

std::string Device::description() const { return "cpu (" + (arch_.empty() ? machine() : arch_) + ")"; }

std::vector<Value> Device::vm_devices() const { return {std::int64_t{kCpu}, std::int64_t{0}, kPooledAllocator}; }

std::size_t Device::cache_budget() const { return kCacheBudget; }

std::shared_ptr<void> Device::allocate(std::size_t bytes) {
  // Pages come zeroed, and are only committed when they are first written.
  const std::size_t size = std::max<std::size_t>(bytes, 1);
  void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    throw std::runtime_error("There is no memory for a tensor of " + std::to_string(bytes >> 20) +
                             " MiB. Give a smaller cache_tokens.");
  return {memory, [size](void* p) { ::munmap(p, size); }};
}

Value Device::zeros(const Shape& shape, const std::string& dtype) {
  std::size_t bytes = bytes_of(dtype);
  for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
  const std::shared_ptr<void> memory = allocate(bytes);
  return Tvm::tensor(memory.get(), memory, dl_device(), shape, dtype);
}

Value Device::weight(const Artifact& artifact, const WeightEntry& entry) {
  const unsigned char* data = artifact.data(entry);
  if (reinterpret_cast<std::uintptr_t>(data) % kAlignment == 0)
    return Tvm::tensor(const_cast<unsigned char*>(data), artifact.mapping(entry), dl_device(), entry.shape,
                       entry.dtype);
  Value copy = zeros(entry.shape, entry.dtype);
  upload(copy, data);
  return copy;
}

void Device::upload(const Value& tensor, const void* source) {
  if (tensor.tensor_bytes() > 0) std::memcpy(tensor.tensor().data, source, tensor.tensor_bytes());
}

void Device::download(void* target, const Value& tensor) {
  if (tensor.tensor_bytes() > 0) std::memcpy(target, tensor.tensor().data, tensor.tensor_bytes());
}

std::unique_ptr<Ring> Device::ring(std::size_t depth, std::size_t width) {
  return std::make_unique<CpuRing>(depth, width);
}

std::unique_ptr<Graph> Device::capture(const std::function<void()>&) { return nullptr; }

Value Device::staged(const std::string& name, const void* values, const Shape& shape, const std::string& dtype) {
  std::string key = name;
  for (const std::int64_t size : shape) key += ',' + std::to_string(size);
  auto found = std::find_if(staged_.begin(), staged_.end(), [&](const auto& entry) { return entry.first == key; });
  if (found == staged_.end()) found = staged_.insert(found, {key, zeros(shape, dtype)});
  upload(found->second, values);
  return found->second;
}

Value Device::staged(const std::string& name, const std::vector<std::int32_t>& values, const Shape& shape) {
  return staged(name, values.data(), shape, "int32");
}

Value Device::staged(const std::string& name, const std::vector<float>& values) {
  return staged(name, values.data(), {static_cast<std::int64_t>(values.size())}, "float32");
}

Value Device::staged(const std::string& name, const std::vector<std::uint8_t>& values, const Shape& shape) {
  return staged(name, values.data(), shape, "uint8");
}

std::function<std::unique_ptr<Device>()> find_device(const std::string& wanted, const Manifest& manifest) {
  const std::string device = wanted.empty() ? manifest.target_kind : wanted;
  const std::string kind = device.substr(0, device.find(':'));
  const std::string index = device == kind ? "0" : device.substr(kind.size() + 1);
  const bool number = index.size() <= 4 && index.find_first_not_of("0123456789") == std::string::npos;
  if ((kind != "cpu" && kind != "cuda") || index.empty() || (kind == "cuda" && !number))
    throw std::runtime_error("Unknown device '" + device + "'. Use cpu, cuda or cuda:1.");
  if (kind != manifest.target_kind)
    throw std::runtime_error("This artifact was compiled for " + manifest.target_kind + " and cannot run on " + device +
                             ". Compile it with --target " + kind + ".");
  if (kind == "cuda") return find_cuda(std::stoi(index), manifest);
  const std::string arch = choose_code(manifest.archs, number ? "" : index);
  return [arch] { return std::make_unique<Device>(arch); };
}

}  // namespace gptq_compile::detail
