// SPDX-License-Identifier: Apache-2.0
#include "model.h"

#include <algorithm>
#include <stdexcept>

namespace gptq_compile::detail {

Model::Model(const Artifact& artifact, Device& device) {
  const Manifest& manifest = artifact.manifest();
  const auto chosen = manifest.libraries.find(device.arch());
  const std::string path = artifact.path(chosen == manifest.libraries.end() ? manifest.library : chosen->second);
  module_ = Tvm::function("ffi.ModuleLoadFromFile")({path.c_str()});
  const Value load = Tvm::module_function(module_, "vm_load_executable");
  if (load.empty()) throw std::runtime_error(path + " is not a compiled model: it has no vm_load_executable.");
  vm_ = load({});
  Tvm::module_function(vm_, "vm_initialization")(device.vm_devices());
  const auto entry = [&](const std::string& name) {
    Value found = Tvm::module_function(vm_, name.c_str());
    if (found.empty()) throw std::runtime_error(path + " has no entry '" + name + "', which the manifest lists.");
    return found;
  };
  forward = entry(manifest.forward);
  sample = entry(manifest.sample);
  repetition_penalty = entry(manifest.repetition_penalty);
  mark_seen = entry(manifest.mark_seen);
  advance = entry(manifest.advance);
  for (const auto& [size, name] : manifest.decode) decode[size] = entry(name);
  std::vector<Value> tensors;
  for (const WeightEntry& weight : manifest.weights) tensors.push_back(device.weight(artifact, weight));
  weights = Tvm::array(tensors);
}

PagedCache::PagedCache(const Manifest& manifest, Device& device, std::int64_t tokens) : page_size_(manifest.page_size) {
  const std::int64_t pages = std::max<std::int64_t>(1, pages_for(tokens));
  capacity_ = pages * page_size_;
  max_sequence_ = std::min(manifest.context_length, capacity_);
  table_width_ = pages_for(max_sequence_);
  std::vector<Value> arrays;
  for (const CacheLayer& layer : manifest.cache_layers)
    for (const std::int64_t width : {layer.head_dim, layer.v_head_dim})
      // Zeros, not garbage: a kernel may read a whole page and multiply what lies ahead by zero.
      arrays.push_back(
          device.zeros({pages + 1, layer.kv_heads, page_size_, manifest.cache_width(width)}, manifest.cache_dtype));
  tensors_ = Tvm::array(arrays);
  for (std::int64_t page = pages; page > 0; --page) free_.push_back(static_cast<std::int32_t>(page));
}

std::vector<std::int32_t> PagedCache::allocate(std::int64_t tokens) {
  const std::int64_t need = pages_for(tokens);
  const auto available = static_cast<std::int64_t>(free_.size());
  if (need > available || need > table_width_)
    throw std::runtime_error("The KV cache has " + std::to_string(available * page_size_) + " free tokens of " +
                             std::to_string(capacity_) + ", and a sequence needs " + std::to_string(tokens) +
                             ". Finish other generations first, or give a larger cache_tokens.");
  std::vector<std::int32_t> row(static_cast<std::size_t>(table_width_), kScratch);
  for (std::int64_t i = 0; i < need; ++i) {
    row[static_cast<std::size_t>(i)] = free_.back();
    free_.pop_back();
  }
  return row;
}

void PagedCache::release(const std::vector<std::int32_t>& row) {
  std::copy_if(row.rbegin(), row.rend(), std::back_inserter(free_), [](std::int32_t page) { return page != kScratch; });
}

std::int32_t PagedCache::slot(const std::vector<std::int32_t>& row, std::int64_t position) const {
  const std::int64_t page = row[static_cast<std::size_t>(position / page_size_)];
  return static_cast<std::int32_t>(page * page_size_ + position % page_size_);
}

namespace {

// Rounds up so that few lengths occur: the VM's memory pool keeps buffers per size and would grow with each. Exact up
// to 8 tokens, then in steps of an eighth to a quarter of the length. The Python runtime rounds the same way, so both
// compute the same sums.
std::int64_t padded_length(std::int64_t tokens) {
  int bits = 0;
  for (std::int64_t rest = tokens - 1; rest > 0; rest >>= 1) ++bits;
  const std::int64_t step = std::int64_t{1} << std::max(0, bits - 3);
  return (tokens + step - 1) / step * step;
}

}  // namespace

Value run_forward(Device& device, const Model& model, const PagedCache& cache, const std::int32_t* ids,
                  std::int64_t count, std::int64_t first_position, const std::vector<std::int32_t>& page_row,
                  bool every_row) {
  const auto padded = static_cast<std::size_t>(padded_length(count));
  // Padding tokens belong to a sequence of their own, the second row of the table, whose only page is the scratch page.
  std::vector<std::int32_t> tokens(padded, 0), positions(padded, 0), sequence(padded, 1),
      slots(padded, PagedCache::kScratch);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(i);
    tokens[at] = ids[i];
    positions[at] = static_cast<std::int32_t>(first_position + i);
    sequence[at] = 0;
    slots[at] = cache.slot(page_row, first_position + i);
  }
  std::vector<std::int32_t> table = page_row, rows;
  table.resize(2 * page_row.size(), PagedCache::kScratch);
  for (std::int64_t i = every_row ? 0 : count - 1; i < count; ++i) rows.push_back(static_cast<std::int32_t>(i));
  const auto n = static_cast<std::int64_t>(padded), m = static_cast<std::int64_t>(rows.size());
  return model.forward({device.staged("tokens", tokens, {n}), device.staged("positions", positions, {n}),
                        device.staged("sequence", sequence, {n}), device.staged("slots", slots, {n}),
                        device.staged("table", table, {2, cache.table_width()}), device.staged("rows", rows, {m}),
                        cache.tensors(), model.weights});
}

}  // namespace gptq_compile::detail
