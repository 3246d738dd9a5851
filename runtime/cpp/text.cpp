// SPDX-License-Identifier: Apache-2.0
#include "text.h"

#include <algorithm>

#include "utf8.h"

namespace gptq_compile::detail {

std::string IncrementalDecoder::push(std::int32_t token) {
  window_.push_back(token);
  return advance(false);
}

std::string IncrementalDecoder::flush() { return advance(true); }

std::string IncrementalDecoder::advance(bool final) {
  if (tokenizer_ == nullptr) return "";
  // Counted in characters: a U+FFFD that becomes a character has other bytes, and more or fewer of them.
  const auto shown = static_cast<std::ptrdiff_t>(emitted_);
  const std::vector<std::uint32_t> before = code_points(tokenizer_->decode({window_.begin(), window_.begin() + shown}));
  const std::vector<std::uint32_t> after = code_points(tokenizer_->decode(window_));
  if (after.size() <= before.size() || (after.back() == kReplacement && !final)) return "";
  window_.erase(window_.begin(), window_.begin() + shown);
  emitted_ = window_.size();
  return to_utf8(after, before.size(), after.size());
}

std::string StopScanner::push(std::string_view text) {
  if (stopped_) return "";
  pending_ += text;
  std::size_t found = std::string::npos, hold = 0;
  for (const std::string& stop : stops_) {
    found = std::min(found, pending_.find(stop));
    // The longest end of the text that is a beginning of the stop string.
    for (std::size_t length = std::min(pending_.size(), stop.size() - 1); length > hold; --length)
      if (pending_.compare(pending_.size() - length, length, stop, 0, length) == 0) hold = length;
  }
  stopped_ = found != std::string::npos;
  const std::size_t cut = stopped_ ? found : pending_.size() - hold;
  std::string shown = pending_.substr(0, cut);
  pending_.erase(0, stopped_ ? pending_.size() : cut);
  return shown;
}

std::string StopScanner::flush() {
  std::string rest;
  rest.swap(pending_);
  return rest;
}

}  // namespace gptq_compile::detail
