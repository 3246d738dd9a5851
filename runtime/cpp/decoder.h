// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "json.h"

namespace gptq_compile::detail {

// The "decoder" section of a tokenizer.json: ByteLevel, or a sequence of Replace, ByteFallback, Fuse and Strip.
class Decoder {
 public:
  Decoder(const Json* section, const std::string& where);
  std::string decode(std::vector<std::string> tokens) const;

 private:
  enum class Kind { byte_level, replace, byte_fallback, fuse, strip };
  struct Step {
    Kind kind;
    std::string from, to;  // strip: what is stripped
    std::int64_t start = 0, stop = 0;
  };
  void add(const Json& section, const std::string& where);

  std::vector<Step> steps_;
};

}  // namespace gptq_compile::detail
