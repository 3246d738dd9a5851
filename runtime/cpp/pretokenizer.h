// SPDX-License-Identifier: Apache-2.0
// The "normalizer" and "pre_tokenizer" sections of a tokenizer.json.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "json.h"
#include "regex.h"

namespace gptq_compile::detail {

// None, NFC, Prepend and Replace of a text, or a sequence of those.
class Normalizer {
 public:
  Normalizer(const Json* section, const std::string& where);
  std::string apply(std::string_view text) const;

 private:
  enum class Kind { nfc, prepend, replace };
  struct Step {
    Kind kind;
    std::string from, to;
  };
  void add(const Json& section, const std::string& where);
  std::vector<Step> steps_;
};

// Every occurrence of `from` replaced, from the left.
std::string replaced(std::string_view text, const std::string& from, const std::string& to);

// Splits a text into the pieces that are encoded by themselves: Split and Digits, and ByteLevel at the end or not.
class PreTokenizer {
 public:
  PreTokenizer(const Json* section, const std::string& where);
  std::vector<std::string> split(std::string_view text) const;
  bool byte_level() const { return byte_level_; }  // pieces are bytes; otherwise characters

 private:
  enum class Keep { all, matches, gaps, merged };  // which of the pieces remain; merged: a match ends the gap before it
  struct Step {
    Regex regex;
    Keep keep;
  };
  void add(const Json& section, const std::string& where, bool last);
  void add_split(const Json& section, const std::string& where);

  std::vector<Step> steps_;
  std::size_t before_prefix_ = 0;  // steps that come before a space is put in front
  bool prefix_space_ = false, byte_level_ = false;
};

}  // namespace gptq_compile::detail
