// SPDX-License-Identifier: Apache-2.0
// The "normalizer" and "pre_tokenizer" sections of a tokenizer.json.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "json.h"
#include "regex.h"

namespace gptq_compile::detail {

// None, NFC, or a sequence of those.
class Normalizer {
 public:
  Normalizer(const Json* section, const std::string& where);
  std::string apply(std::string_view text) const;

 private:
  bool nfc_ = false;
};

// Splits a text into the pieces that are encoded by themselves: ByteLevel, at the end of a sequence of Split and
// Digits.
class PreTokenizer {
 public:
  PreTokenizer(const Json* section, const std::string& where);
  std::vector<std::string> split(std::string_view text) const;

 private:
  enum class Keep { all, matches, gaps };  // which of the pieces remain
  struct Step {
    Regex regex;
    Keep keep;
  };
  void add(const Json& section, const std::string& where, bool last);
  void add_split(const Json& section, const std::string& where);

  std::vector<Step> steps_;
  std::size_t before_prefix_ = 0;  // steps that come before a space is put in front
  bool prefix_space_ = false;
};

}  // namespace gptq_compile::detail
