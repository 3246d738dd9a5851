// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "json.h"
#include "pretokenizer.h"

namespace gptq_compile::detail {

// The "added_tokens" of a tokenizer.json: found in a text before anything else is done to it.
class AddedTokens {
 public:
  struct Piece {
    std::string text;
    std::int32_t id;  // -1: ordinary text
  };

  AddedTokens(const Json* section, const Normalizer& normalizer, const std::string& where);

  // Added tokens, and normalized text between them.
  std::vector<Piece> split(std::string_view text, const Normalizer& normalizer) const;
  const std::string* token(std::int32_t id) const;  // its text; null if it is not an added token
  bool is_special(std::int32_t id) const;

 private:
  struct Token {
    std::string text;
    std::int32_t id;
    bool left, right;  // takes the white space beside it
  };
  // Tokens by their first byte, longest first.
  using Finder = std::unordered_map<char, std::vector<Token>>;
  static void find(const Finder& finder, std::string_view text, std::vector<Piece>& out);

  Finder raw_, normalized_;
  struct Entry {
    std::string text;
    bool special;
  };
  std::unordered_map<std::int32_t, Entry> by_id_;
};

}  // namespace gptq_compile::detail
