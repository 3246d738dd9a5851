// SPDX-License-Identifier: Apache-2.0
// One decode step, on the device from end to end, as a CUDA graph where there are graphs.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "device.h"
#include "gptq_compile.h"
#include "model.h"

namespace gptq_compile::detail {

// A step is: decode, repetition penalty, sample, mark the token as seen, advance. Its inputs and outputs are fixed
// buffers, so that a recorded step can be replayed; the host only reads tokens back, some steps later. The artifact's
// smallest batch size is used; rows beyond the first write to the scratch page and are ignored.
class DecodeStep {
 public:
  DecodeStep(Device& device, const Model& model, const PagedCache& cache, std::int64_t vocab_size);

  // Makes the last of `tokens` (prompt and output so far) the next step's input; forgets what is in flight.
  void load(const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& page_row,
            const Sampling& sampling);
  void launch();           // enqueues one step
  std::int32_t collect();  // waits for the oldest step in flight; a negative token means invalid logits
  std::size_t in_flight() const { return launched_ - collected_; }
  std::size_t graph_nodes() const;

  // Samples from logits [1, vocabulary] that stand at `position`, the last of `tokens`.
  std::int32_t first_token(Value logits, const std::vector<std::int32_t>& tokens, const Sampling& sampling);

 private:
  struct Outputs {
    Value logits, tokens, moved;
  };
  Outputs run() const;
  void check_in_place(const Outputs& outputs) const;

  Device& device_;
  const Model& model_;
  const PagedCache& cache_;
  std::int64_t size_, vocab_;
  const Value* decode_;
  Value rows_, input_ids_, positions_, slots_, page_table_, temperature_, top_k_, top_p_, min_p_, seeds_, penalty_,
      seen_;
  bool penalized_ = false;
  std::unique_ptr<Ring> ring_;
  std::size_t launched_ = 0, collected_ = 0;

  struct Recorded {
    bool tried = false;
    std::unique_ptr<Graph> graph;
    Outputs outputs;  // what the graph writes to must stay
  };
  struct Kind {
    int direct_steps = 0;
    Outputs outputs;               // of the last step that ran directly
    std::vector<Recorded> graphs;  // one for each row of the ring: what one has sampled is read while the next one runs
  };
  std::array<Kind, 2> kinds_;  // without and with repetition penalty
};

}  // namespace gptq_compile::detail
