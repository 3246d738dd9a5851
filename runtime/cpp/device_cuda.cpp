// SPDX-License-Identifier: Apache-2.0
// One NVIDIA GPU with one non-blocking stream on which everything that computes happens in order.
#include <stdexcept>

#include "cuda.h"
#include "device.h"

namespace gptq_compile::detail {

namespace {

constexpr std::size_t kDepth = 3;    // decode steps in flight
constexpr double kCacheShare = 0.6;  // of the memory that is free after the weights

// The driver with this device's context and stream; lives as long as anything on the device.
struct Gpu {
  cuda::Driver driver;
  int index;
  void* context;
  void* stream;

  explicit Gpu(int i)
      : index(i), context(driver.retain_context(i)), stream((driver.use(context), driver.new_stream())) {}
  ~Gpu() { driver.destroy_stream(stream); }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
};

cuda::Pointer pointer_of(const Value& tensor) { return reinterpret_cast<cuda::Pointer>(tensor.tensor().data); }

class CudaGraph : public Graph {
 public:
  CudaGraph(std::shared_ptr<Gpu> gpu, void* graph, std::size_t nodes)
      : gpu_(std::move(gpu)), graph_(graph), nodes_(nodes) {}
  ~CudaGraph() override { gpu_->driver.destroy_graph(graph_); }
  void launch() override { gpu_->driver.launch(graph_, gpu_->stream); }
  std::size_t nodes() const override { return nodes_; }

 private:
  std::shared_ptr<Gpu> gpu_;
  void* graph_;
  std::size_t nodes_;
};

// Page-locked rows. Copies have a stream of their own: in the one that computes, a copy of four bytes keeps the next
// step from starting for 18 us (H200).
class PinnedRing : public Ring {
 public:
  PinnedRing(std::shared_ptr<Gpu> gpu, std::size_t depth, std::size_t width) : gpu_(std::move(gpu)), width_(width) {
    rows_ = static_cast<std::int32_t*>(gpu_->driver.allocate_pinned(depth * width * sizeof(std::int32_t)));
    copies_ = gpu_->driver.new_stream();
    for (std::size_t i = 0; i < depth; ++i) {
      computed_.push_back(gpu_->driver.new_event());
      copied_.push_back(gpu_->driver.new_event());
    }
  }
  ~PinnedRing() override {
    try {
      gpu_->driver.synchronize(copies_);
    } catch (const std::exception&) {  // a device that fails has said so already
    }
    gpu_->driver.destroy_stream(copies_);
    for (void* event : computed_) gpu_->driver.destroy_event(event);
    for (void* event : copied_) gpu_->driver.destroy_event(event);
    gpu_->driver.free_pinned(rows_);
  }
  void push(std::size_t row, const Value& tokens, bool reused) override {
    gpu_->driver.record(computed_[row], gpu_->stream);
    gpu_->driver.follow(copies_, computed_[row]);
    gpu_->driver.download(rows_ + row * width_, pointer_of(tokens), width_ * sizeof(std::int32_t), copies_);
    gpu_->driver.record(copied_[row], copies_);
    if (reused) gpu_->driver.follow(gpu_->stream, copied_[row]);
  }
  const std::int32_t* wait(std::size_t row) override {
    gpu_->driver.wait(copied_[row]);
    return rows_ + row * width_;
  }

 private:
  std::shared_ptr<Gpu> gpu_;
  std::size_t width_;
  std::int32_t* rows_ = nullptr;
  void* copies_ = nullptr;
  std::vector<void*> computed_, copied_;
};

class CudaDevice : public Device {
 public:
  explicit CudaDevice(int index) : gpu_(std::make_shared<Gpu>(index)) {}

  std::string description() const override {
    const auto [major, minor] = gpu_->driver.capability(gpu_->index);
    return "cuda:" + std::to_string(gpu_->index) + " (" + gpu_->driver.name(gpu_->index) + ", sm_" +
           std::to_string(major) + std::to_string(minor) + ")";
  }
  std::size_t depth() const override { return kDepth; }
  std::int64_t prefill_tokens() const override { return 1024; }
  std::vector<Value> vm_devices() const override {
    std::vector<Value> values = {std::int64_t{kCuda}, std::int64_t{gpu_->index}, kPooledAllocator};
    for (const Value& value : Device::vm_devices()) values.push_back(value);
    return values;
  }
  std::size_t cache_budget() const override {
    return static_cast<std::size_t>(static_cast<double>(gpu_->driver.free_bytes()) * kCacheShare);
  }
  Value weight(const Artifact& artifact, const WeightEntry& entry) override {
    Value tensor = zeros(entry.shape, entry.dtype);
    upload(tensor, artifact.data(entry));
    return tensor;
  }
  void upload(const Value& tensor, const void* source) override {
    gpu_->driver.upload(pointer_of(tensor), source, tensor.tensor_bytes(), gpu_->stream);
  }
  void download(void* target, const Value& tensor) override {
    gpu_->driver.download(target, pointer_of(tensor), tensor.tensor_bytes(), gpu_->stream);
    synchronize();
  }
  void synchronize() override { gpu_->driver.synchronize(gpu_->stream); }
  std::unique_ptr<Ring> ring(std::size_t depth, std::size_t width) override {
    return std::make_unique<PinnedRing>(gpu_, depth, width);
  }

  std::unique_ptr<Graph> capture(const std::function<void()>& run) override {
    gpu_->driver.begin_capture(gpu_->stream);
    std::pair<void*, std::size_t> graph{nullptr, 0};
    try {
      run();
    } catch (const std::exception&) {
      gpu_->driver.abandon_capture(gpu_->stream);
      return nullptr;  // the step then runs directly, and says what is wrong if something is
    }
    try {
      graph = gpu_->driver.end_capture(gpu_->stream);
    } catch (const std::exception&) {
      return nullptr;
    }
    auto result = std::make_unique<CudaGraph>(gpu_, graph.first, graph.second);
    if (result->nodes() == 0)
      throw std::runtime_error("The TVM runtime does not launch on the stream it was given. Compile the model again.");
    return result;
  }

  void* enter() override {
    gpu_->driver.use(gpu_->context);  // the context is per thread
    return Tvm::set_stream(dl_device(), gpu_->stream);
  }
  void leave(void* before) noexcept override {
    try {
      Tvm::set_stream(dl_device(), before);
    } catch (const std::exception&) {  // only an unknown device can fail, and entering would have
    }
  }

 protected:
  DlDevice dl_device() const override { return {kCuda, gpu_->index}; }
  std::shared_ptr<void> allocate(std::size_t bytes) override {
    const cuda::Pointer pointer = gpu_->driver.allocate(bytes == 0 ? 1 : bytes);
    std::shared_ptr<void> memory(reinterpret_cast<void*>(pointer),
                                 [gpu = gpu_, pointer](void*) { gpu->driver.free(pointer, gpu->context); });
    gpu_->driver.clear(pointer, bytes, gpu_->stream);
    return memory;
  }

 private:
  std::shared_ptr<Gpu> gpu_;
};

}  // namespace

std::function<std::unique_ptr<Device>()> find_cuda(int index, const Manifest& manifest) {
  const cuda::Driver driver;
  if (index >= driver.devices())
    throw std::runtime_error("Device cuda:" + std::to_string(index) + " does not exist: this machine has " +
                             std::to_string(driver.devices()) + " GPU(s).");
  const std::pair<int, int> capability = driver.capability(index);
  if (!cuda::runs_on(manifest.archs, capability)) {
    const std::string arch = "sm_" + std::to_string(capability.first) + std::to_string(capability.second);
    std::string built;
    for (const std::string& each : manifest.archs) built += (built.empty() ? "" : ", ") + each;
    throw std::runtime_error("This artifact was compiled for " + built + ", and " + driver.name(index) + " is " + arch +
                             ". Compile it with --target cuda:" + arch + ".");
  }
  return [index] { return std::make_unique<CudaDevice>(index); };
}

}  // namespace gptq_compile::detail
