// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "artifact.h"
#include "decode.h"
#include "device.h"
#include "gptq_compile.h"
#include "model.h"
#include "text.h"

namespace gptq_compile {

struct Engine::Impl {
  Impl(const std::string& folder, const Options& options);
  ~Impl();

  void check_ids(const std::vector<std::int32_t>& ids) const;
  // Most tokens of one call of `forward`: what the device likes and the artifact has room for.
  std::int64_t prefill_tokens() const;
  // Runs the prompt through `forward` in chunks; returns the last token's logits on the device.
  detail::Value prefill(const std::vector<std::int32_t>& ids, const std::vector<std::int32_t>& page_row);
  // Gives the decode step to a generation: what it has in flight for another one is collected first.
  void take_over(Generation::Impl* generation);

  detail::Artifact artifact;
  std::unique_ptr<detail::Device> device;
  std::unique_ptr<detail::Model> model;
  std::unique_ptr<detail::PagedCache> cache;
  std::unique_ptr<detail::DecodeStep> step;
  std::unique_ptr<Tokenizer> tokenizer;
  std::string no_tokenizer;  // why there is none
  Generation::Impl* owner = nullptr;
};

struct Generation::Impl {
  Impl(std::shared_ptr<Engine::Impl> engine, const std::vector<std::int32_t>& ids, const Sampling& sampling);
  ~Impl();

  std::optional<std::int32_t> next();
  void accept(std::int32_t token);
  void end(const char* reason);
  std::size_t generated() const { return tokens.size() - prompt; }

  std::shared_ptr<Engine::Impl> engine;
  Sampling sampling;
  std::vector<std::int32_t> eos;
  std::vector<std::int32_t> tokens;     // prompt and output
  std::size_t prompt, limit, launched;  // tokens of the prompt; most to generate; generated, those in flight included
  std::vector<std::int32_t> page_row;
  std::deque<std::int32_t> pending;  // collected, but not yet asked for
  detail::IncrementalDecoder decoder;
  detail::StopScanner scanner;
  std::string text, fresh;  // all of it, and what nobody has taken yet
  std::string finish_reason;
  std::chrono::steady_clock::time_point started, first_token, last_token;
};

}  // namespace gptq_compile
