// SPDX-License-Identifier: Apache-2.0
// Byte-pair encoding (Sennrich et al. 2016) over bytes (Radford et al. 2019, section 2.2) or, as SentencePiece does it,
// over characters with bytes for those that the vocabulary lacks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "json.h"

namespace gptq_compile::detail {

// GPT-2's byte alphabet: printable bytes stand for themselves, the others are code points from 256 on.
class ByteAlphabet {
 public:
  static const ByteAlphabet& get();
  std::uint32_t code_of(unsigned char byte) const { return codes_[byte]; }
  // The bytes that a token's text stands for; false if a character is not in the alphabet.
  bool bytes_of(std::string_view token, std::string& bytes) const;

 private:
  ByteAlphabet();
  std::array<std::uint32_t, 256> codes_;
  std::unordered_map<std::uint32_t, unsigned char> bytes_;
};

constexpr std::int64_t kMaxToken = (std::int64_t{1} << 31) - 1;

// A tokenizer.json asks for what is not done here. `what` completes "PATH ...".
[[noreturn]] void refuse(const std::string& where, const std::string& what);

class Bpe {
 public:
  // Reads the "model" section of a tokenizer.json; `where` is its path. `byte_level` says what the merges begin with:
  // bytes in GPT-2's alphabet, or characters.
  Bpe(const Json& model, bool byte_level, const std::string& where);

  // Appends the tokens of one piece.
  void encode(std::string_view piece, std::vector<std::int32_t>& out) const;
  const std::string* token(std::int32_t id) const;  // as it stands in the vocabulary; null if there is none

 private:
  struct Merge {
    std::int32_t rank, token;
  };
  static std::uint64_t pair(std::int32_t a, std::int32_t b) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(a)) << 32 | static_cast<std::uint32_t>(b);
  }
  void read_vocabulary(const Json& model, const std::string& where);
  void read_merges(const Json& model, const std::string& where);
  // The tokens that merging begins with.
  std::vector<std::int32_t> units(std::string_view piece) const;

  std::unordered_map<std::string, std::int32_t> vocabulary_;
  std::vector<const std::string*> tokens_;               // by id
  std::unordered_map<std::string, std::int32_t> whole_;  // bytes -> id, where pieces that are tokens are not merged
  std::unordered_map<std::uint64_t, Merge> merges_;
  std::array<std::int32_t, 256> byte_tokens_;  // of the bytes' characters; -1: the vocabulary lacks it
  std::array<std::int32_t, 256> fallback_;     // of <0x00> to <0xFF>
  bool byte_level_, fallback_for_unknown_ = false, fuse_unknown_ = false;
  std::int32_t unknown_ = -1;  // stands for what nothing else does; -1: that is dropped
};

}  // namespace gptq_compile::detail
