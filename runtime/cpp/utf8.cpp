// SPDX-License-Identifier: Apache-2.0
#include "utf8.h"

namespace gptq_compile::detail {

void append_utf8(std::string& out, std::uint32_t code) {
  const auto byte = [&out](std::uint32_t b) { out += static_cast<char>(static_cast<unsigned char>(b)); };
  if (code < 0x80) {
    byte(code);
  } else if (code < 0x800) {
    byte(0xC0 | code >> 6);
    byte(0x80 | (code & 63));
  } else if (code < 0x10000) {
    byte(0xE0 | code >> 12);
    byte(0x80 | (code >> 6 & 63));
    byte(0x80 | (code & 63));
  } else {
    byte(0xF0 | code >> 18);
    byte(0x80 | (code >> 12 & 63));
    byte(0x80 | (code >> 6 & 63));
    byte(0x80 | (code & 63));
  }
}

std::uint32_t next_code_point(std::string_view text, std::size_t& at, bool* valid) {
  const auto byte = [&](std::size_t i) -> unsigned {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u;  // 0 never continues a sequence
  };
  if (valid != nullptr) *valid = true;
  const unsigned first = byte(at++);
  if (first < 0x80) return first;
  // Allowed ranges of the second byte exclude overlong forms, surrogates and what lies beyond U+10FFFF.
  int more = 0;
  unsigned low = 0x80, high = 0xBF;
  std::uint32_t code = 0;
  if (first >= 0xC2 && first <= 0xDF) {
    more = 1;
    code = first & 31;
  } else if (first >= 0xE0 && first <= 0xEF) {
    more = 2;
    code = first & 15;
    if (first == 0xE0) low = 0xA0;
    if (first == 0xED) high = 0x9F;
  } else if (first >= 0xF0 && first <= 0xF4) {
    more = 3;
    code = first & 7;
    if (first == 0xF0) low = 0x90;
    if (first == 0xF4) high = 0x8F;
  }
  bool good = more > 0;
  for (; more > 0; --more, low = 0x80, high = 0xBF) {
    const unsigned b = byte(at);
    if (b < low || b > high) {
      good = false;
      break;
    }
    code = code << 6 | (b & 63);
    ++at;
  }
  if (good) return code;
  if (valid != nullptr) *valid = false;
  return kReplacement;
}

bool is_utf8(std::string_view text) {
  bool valid = true;
  for (std::size_t at = 0; at < text.size() && valid;) next_code_point(text, at, &valid);
  return valid;
}

std::vector<std::uint32_t> code_points(std::string_view text) {
  std::vector<std::uint32_t> codes;
  codes.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) codes.push_back(next_code_point(text, at));
  return codes;
}

std::string to_utf8(const std::vector<std::uint32_t>& codes, std::size_t begin, std::size_t end) {
  std::string out;
  out.reserve(end - begin);
  for (std::size_t i = begin; i < end; ++i) append_utf8(out, codes[i]);
  return out;
}

std::string valid_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (std::size_t at = 0; at < bytes.size();) append_utf8(out, next_code_point(bytes, at));
  return out;
}

}  // namespace gptq_compile::detail
