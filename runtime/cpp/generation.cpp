// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "engine_impl.h"

namespace gptq_compile {

namespace {

using Clock = std::chrono::steady_clock;

void require(bool good, const char* name, double value, const char* allowed) {
  if (good) return;
  std::string text = std::to_string(value);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  throw std::runtime_error(std::string(name) + " is " + text + "; it must be " + allowed + ".");
}

void check(const Sampling& s) {
  require(s.max_new_tokens >= 1, "max_new_tokens", s.max_new_tokens, "1 or more");
  if (s.do_sample)
    require(std::isfinite(s.temperature) && s.temperature > 0, "temperature", static_cast<double>(s.temperature),
            "greater than 0 (use do_sample = false for greedy)");
  require(s.top_k >= 0, "top_k", s.top_k, "0 (off) or more");
  require(s.top_p > 0 && s.top_p <= 1, "top_p", static_cast<double>(s.top_p), "above 0 and at most 1");
  require(s.min_p >= 0 && s.min_p <= 1, "min_p", static_cast<double>(s.min_p), "from 0 to 1");
  require(std::isfinite(s.repetition_penalty) && s.repetition_penalty > 0, "repetition_penalty",
          static_cast<double>(s.repetition_penalty), "greater than 0");
  for (const std::string& stop : s.stop)
    if (stop.empty()) throw std::runtime_error("A stop string is empty; it must be text.");
}

double seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

Generation::Impl::Impl(std::shared_ptr<Engine::Impl> e, const std::vector<std::int32_t>& ids, const Sampling& s)
    : engine(std::move(e)),
      sampling(s),
      eos(s.eos_token_ids.value_or(engine->artifact.manifest().eos_token_ids)),
      tokens(ids),
      prompt(ids.size()),
      limit(0),
      launched(0),
      decoder(engine->tokenizer.get()),
      scanner(s.stop),
      started(Clock::now()),
      first_token(started),
      last_token(started) {
  check(sampling);
  engine->check_ids(ids);
  const auto room = static_cast<std::size_t>(engine->cache->max_sequence());
  const std::int64_t context = engine->artifact.manifest().context_length;
  if (ids.size() >= room)
    throw std::runtime_error("The prompt has " + std::to_string(ids.size()) + " tokens, and the " +
                             (engine->cache->max_sequence() == context ? "model's context is " : "KV cache holds ") +
                             std::to_string(room) + ", new tokens included. Shorten the prompt" +
                             (engine->cache->max_sequence() == context ? "." : " or give a larger cache_tokens."));
  limit = std::min(static_cast<std::size_t>(sampling.max_new_tokens), room - ids.size());
  // Pages for its whole life: it can never run out in the middle.
  page_row = engine->cache->allocate(static_cast<std::int64_t>(ids.size() + limit));
}

Generation::Impl::~Impl() {
  if (finish_reason.empty()) end("cancelled");
}

void Generation::Impl::end(const char* reason) {
  finish_reason = reason;
  if (engine->owner == this) engine->owner = nullptr;  // what is in flight is dropped by the next load
  // Steps in flight may still write to the pages; they come before any later owner's on the stream.
  engine->cache->release(page_row);
}

std::optional<std::int32_t> Generation::Impl::next() {
  if (!finish_reason.empty()) return std::nullopt;
  const detail::StreamScope stream(*engine->device);
  std::int32_t token = 0;
  try {
    if (launched == 0) {
      const detail::Value logits = engine->prefill(tokens, page_row);
      token = engine->step->first_token(logits, tokens, sampling);
      launched = 1;
    } else if (!pending.empty()) {
      token = pending.front();
      pending.pop_front();
    } else {
      engine->take_over(this);
      while (engine->step->in_flight() < engine->device->depth() && launched < limit) {
        engine->step->launch();
        ++launched;
      }
      token = engine->step->collect();
    }
  } catch (...) {
    end("cancelled");
    throw;
  }
  if (token < 0) {
    end("cancelled");
    throw std::runtime_error("The model computed NaN or infinite logits after " + std::to_string(tokens.size()) +
                             " tokens. The weights are damaged, or values overflow the activation type.");
  }
  accept(token);
  return token;
}

void Generation::Impl::accept(std::int32_t token) {
  last_token = Clock::now();
  if (generated() == 0) first_token = last_token;
  tokens.push_back(token);
  const bool is_eos = std::find(eos.begin(), eos.end(), token) != eos.end();
  const auto emit = [this](const std::string& piece) {
    text += piece;
    fresh += piece;
  };
  if (!is_eos) {
    emit(scanner.push(decoder.push(token)));
    if (scanner.stopped()) {
      end("stop");
      return;
    }
    if (generated() < limit) return;
  }
  // What was held back comes out now; it may still complete a stop string.
  emit(scanner.push(decoder.flush()));
  const bool stopped = scanner.stopped();
  emit(scanner.flush());
  end(stopped ? "stop" : is_eos ? "eos" : "length");
}

Generation::Generation(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Generation::~Generation() = default;
Generation::Generation(Generation&&) noexcept = default;
Generation& Generation::operator=(Generation&&) noexcept = default;

std::optional<std::int32_t> Generation::next() { return impl_->next(); }

std::string Generation::take_text() {
  std::string text;
  text.swap(impl_->fresh);
  return text;
}

void Generation::cancel() {
  if (impl_->finish_reason.empty()) impl_->end("cancelled");
}

bool Generation::finished() const { return !impl_->finish_reason.empty(); }

Result Generation::result() const {
  Result result;
  result.text = impl_->text;
  result.token_ids.assign(impl_->tokens.begin() + static_cast<std::ptrdiff_t>(impl_->prompt), impl_->tokens.end());
  result.finish_reason = impl_->finish_reason.empty() ? "running" : impl_->finish_reason;
  result.prompt_tokens = impl_->prompt;
  result.prefill_seconds = seconds(impl_->started, impl_->first_token);
  result.decode_seconds = seconds(impl_->first_token, impl_->last_token);
  return result;
}

}  // namespace gptq_compile
