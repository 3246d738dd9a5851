// SPDX-License-Identifier: Apache-2.0
#include "decode.h"

#include <stdexcept>

namespace gptq_compile::detail {

namespace {

// The first steps run directly: they load kernels and fill the VM's memory pool, which a recording had better not do.
// Two, because the VM keeps its last result until the next one, so the first leaves the pool one set short.
constexpr int kWarmUpSteps = 2;

// What the sample entry takes; temperature 0 is greedy. `size` rows, those beyond the first greedy.
struct Columns {
  std::vector<float> temperature, top_p, min_p, penalty;
  std::vector<std::int32_t> top_k, seeds;

  Columns(const Sampling& s, std::size_t size)
      : temperature(size, 0.0f),
        top_p(size, 1.0f),
        min_p(size, 0.0f),
        penalty(size, 1.0f),
        top_k(size, 1),
        seeds(size, 0) {
    penalty[0] = s.repetition_penalty;
    seeds[0] = static_cast<std::int32_t>(s.seed);
    if (!s.do_sample) return;
    temperature[0] = s.temperature;
    top_p[0] = s.top_p;
    min_p[0] = s.min_p;
    top_k[0] = s.top_k;
  }
};

// uint8 [size, vocab]: 1 in the first row where the token occurs.
std::vector<std::uint8_t> seen_matrix(const std::vector<std::int32_t>& tokens, std::int64_t size, std::int64_t vocab) {
  std::vector<std::uint8_t> seen(static_cast<std::size_t>(size * vocab), 0);
  for (const std::int32_t token : tokens) seen[static_cast<std::size_t>(token)] = 1;
  return seen;
}

}  // namespace

DecodeStep::DecodeStep(Device& device, const Model& model, const PagedCache& cache, std::int64_t vocab_size)
    : device_(device),
      model_(model),
      cache_(cache),
      size_(model.decode.begin()->first),
      vocab_(vocab_size),
      decode_(&model.decode.begin()->second) {
  std::vector<std::int32_t> rows;
  for (std::int64_t i = 0; i < size_; ++i) rows.push_back(static_cast<std::int32_t>(i));
  rows_ = device.zeros({size_}, "int32");
  device.upload(rows_, rows.data());
  for (Value* tensor : {&input_ids_, &positions_, &slots_, &top_k_, &seeds_}) *tensor = device.zeros({size_}, "int32");
  for (Value* tensor : {&temperature_, &top_p_, &min_p_, &penalty_}) *tensor = device.zeros({size_}, "float32");
  page_table_ = device.zeros({size_, cache.table_width()}, "int32");
  ring_ = device.ring(device.depth(), static_cast<std::size_t>(size_));
  for (Kind& kind : kinds_) kind.graphs.resize(device.depth());
}

void DecodeStep::load(const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& page_row,
                      const Sampling& sampling) {
  const auto size = static_cast<std::size_t>(size_);
  const auto position = static_cast<std::int64_t>(tokens.size()) - 1;
  std::vector<std::int32_t> ids(size, 0), positions(size, 0), slots(size, PagedCache::kScratch), table = page_row;
  ids[0] = tokens.back();
  positions[0] = static_cast<std::int32_t>(position);
  slots[0] = cache_.slot(page_row, position);
  table.resize(size * page_row.size(), PagedCache::kScratch);
  device_.upload(input_ids_, ids.data());
  device_.upload(positions_, positions.data());
  device_.upload(slots_, slots.data());
  device_.upload(page_table_, table.data());
  const Columns columns(sampling, size);
  device_.upload(temperature_, columns.temperature.data());
  device_.upload(top_k_, columns.top_k.data());
  device_.upload(top_p_, columns.top_p.data());
  device_.upload(min_p_, columns.min_p.data());
  device_.upload(seeds_, columns.seeds.data());
  device_.upload(penalty_, columns.penalty.data());
  penalized_ = sampling.repetition_penalty != 1.0f;
  if (penalized_) {
    if (seen_.empty()) seen_ = device_.zeros({size_, vocab_}, "uint8");
    device_.upload(seen_, seen_matrix(tokens, size_, vocab_).data());
  }
  launched_ = collected_ = 0;
}

DecodeStep::Outputs DecodeStep::run() const {
  Outputs outputs;
  outputs.logits =
      (*decode_)({input_ids_, positions_, rows_, slots_, page_table_, rows_, cache_.tensors(), model_.weights});
  if (penalized_) outputs.logits = model_.repetition_penalty({outputs.logits, seen_, penalty_});
  outputs.tokens = model_.sample({outputs.logits, temperature_, top_k_, top_p_, min_p_, seeds_, positions_});
  if (penalized_) model_.mark_seen({seen_, outputs.tokens});
  outputs.moved = model_.advance({outputs.tokens, page_table_, input_ids_, positions_, slots_});
  return outputs;
}

void DecodeStep::check_in_place(const Outputs& outputs) const {
  const std::vector<Value> moved = outputs.moved.elements();
  const Value* const expected[] = {&input_ids_, &positions_, &slots_};
  bool good = moved.size() == 3;
  for (std::size_t i = 0; good && i < 3; ++i) good = moved[i].tensor().data == expected[i]->tensor().data;
  if (!good)
    throw std::runtime_error(
        "The artifact's entry 'advance' does not update its arguments in place, so decoding cannot " +
        std::string("work. Compile the model again."));
}

void DecodeStep::launch() {
  Kind& kind = kinds_[penalized_ ? 1 : 0];
  const std::size_t row = launched_ % device_.depth();
  Recorded& recorded = kind.graphs[row];
  const bool warm = kind.direct_steps >= kWarmUpSteps;
  if (warm && !recorded.tried) {
    recorded.tried = true;
    kind.outputs = {};
    recorded.graph = device_.capture([&] { recorded.outputs = run(); });
    if (recorded.graph == nullptr) {
      recorded.outputs = {};
      for (Recorded& other : kind.graphs) other.tried = true;  // they could not be captured either
    }
  }
  // The sampled tokens, not the next input ids: a row whose logits are invalid has token -1 here and 0 there.
  if (recorded.graph != nullptr) {
    recorded.graph->launch();
    ring_->push(row, recorded.outputs.tokens, false);
  } else {
    kind.outputs = {};  // back into the VM's pool, so that this step takes the same buffers
    kind.outputs = run();
    if (!warm && kind.direct_steps++ == 0) check_in_place(kind.outputs);
    ring_->push(row, kind.outputs.tokens, true);
  }
  ++launched_;
}

std::int32_t DecodeStep::collect() { return ring_->wait(collected_++ % device_.depth())[0]; }

std::size_t DecodeStep::graph_nodes() const {
  for (const Kind& kind : kinds_)
    for (const Recorded& recorded : kind.graphs)
      if (recorded.graph != nullptr) return recorded.graph->nodes();
  return 0;
}

std::int32_t DecodeStep::first_token(Value logits, const std::vector<std::int32_t>& tokens, const Sampling& sampling) {
  const Columns columns(sampling, 1);
  const auto floats = [&](const char* name, const std::vector<float>& values) { return device_.staged(name, values); };
  const auto integers = [&](const char* name, const std::vector<std::int32_t>& v) {
    return device_.staged(name, v, {1});
  };
  if (sampling.repetition_penalty != 1.0f) {
    const Value seen = device_.staged("seen", seen_matrix(tokens, 1, vocab_), {1, vocab_});
    logits = model_.repetition_penalty({logits, seen, floats("penalty", columns.penalty)});
  }
  const std::vector<std::int32_t> position = {static_cast<std::int32_t>(tokens.size()) - 1};
  const Value sampled =
      model_.sample({logits, floats("temperature", columns.temperature), integers("top_k", columns.top_k),
                     floats("top_p", columns.top_p), floats("min_p", columns.min_p), integers("seeds", columns.seeds),
                     integers("position", position)});
  std::int32_t token = 0;
  if (sampled.tensor_bytes() != sizeof token)
    throw std::runtime_error("The artifact's entry 'sample' returned no token.");
  device_.download(&token, sampled);
  return token;
}

}  // namespace gptq_compile::detail
