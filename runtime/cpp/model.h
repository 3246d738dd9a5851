// SPDX-License-Identifier: Apache-2.0
// The compiled module in TVM's virtual machine, its weights, and the pages of its KV cache.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "artifact.h"
#include "device.h"
#include "tvm.h"

namespace gptq_compile::detail {

// An artifact's entries and weights on one device.
struct Model {
  Model(const Artifact& artifact, Device& device);

  Value forward, sample, repetition_penalty, mark_seen, advance;
  std::map<std::int64_t, Value> decode;  // batch size -> entry
  Value weights;                         // the tuple, in the manifest's order

 private:
  Value module_, vm_;  // keep the entries valid
};

// The paged KV cache (PagedAttention, Kwon et al. 2023, section 4.2). Page 0 is the scratch page: rows and tokens that
// only fill up a call write there, so they never touch a sequence.
class PagedCache {
 public:
  static constexpr std::int32_t kScratch = 0;

  PagedCache(const Manifest& manifest, Device& device, std::int64_t tokens);

  const Value& tensors() const { return tensors_; }            // (k0, v0, k1, v1, ...)
  std::int64_t capacity() const { return capacity_; }          // tokens that sequences can hold together
  std::int64_t max_sequence() const { return max_sequence_; }  // tokens that one sequence can hold
  std::int64_t table_width() const { return table_width_; }

  // Takes pages for so many tokens: a page table row of table_width entries, unused ones the scratch page.
  std::vector<std::int32_t> allocate(std::int64_t tokens);
  void release(const std::vector<std::int32_t>& row);
  std::int32_t slot(const std::vector<std::int32_t>& row, std::int64_t position) const;  // page * page_size + offset

 private:
  std::int64_t pages_for(std::int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }

  std::int64_t page_size_, capacity_, max_sequence_, table_width_;
  Value tensors_;
  std::vector<std::int32_t> free_;
};

// Calls `forward` on consecutive tokens of one sequence. Returns logits on the device, float32 [rows, vocabulary]: of
// every token, or of the last one.
Value run_forward(Device& device, const Model& model, const PagedCache& cache, const std::int32_t* ids,
                  std::int64_t count, std::int64_t first_position, const std::vector<std::int32_t>& page_row,
                  bool every_row);

}  // namespace gptq_compile::detail
