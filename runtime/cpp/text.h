// SPDX-License-Identifier: Apache-2.0
// Text as it is generated: never half a character, never the beginning of a stop string.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "gptq_compile.h"

namespace gptq_compile::detail {

// Turns tokens into text as they come. Only a short window is decoded again for every token: the tokens of the last
// piece, for decoders that treat the first token of a text differently, and those that are still incomplete.
class IncrementalDecoder {
 public:
  explicit IncrementalDecoder(const Tokenizer* tokenizer) : tokenizer_(tokenizer) {}  // null: there is no text
  std::string push(std::int32_t token);                                               // the text that is now certain
  std::string flush();  // what is left; bytes that never became a character as U+FFFD

 private:
  std::string advance(bool final);
  const Tokenizer* tokenizer_;
  std::vector<std::int32_t> window_;
  std::size_t emitted_ = 0;  // tokens of the window whose text is out
};

// Holds back text that may be the beginning of a stop string, and ends at the first complete one.
class StopScanner {
 public:
  explicit StopScanner(std::vector<std::string> stops) : stops_(std::move(stops)) {}
  std::string push(std::string_view text);  // what can be shown; sets `stopped` when a stop string is complete
  std::string flush();                      // what was held back
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string pending_;
  bool stopped_ = false;
};

}  // namespace gptq_compile::detail
