// SPDX-License-Identifier: Apache-2.0
// UTF-8 to code points and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gptq_compile::detail {

constexpr std::uint32_t kReplacement = 0xFFFD;

// Appends a code point's bytes.
void append_utf8(std::string& out, std::uint32_t code);

// Reads the code point that begins at text[at] and moves `at` behind it. Bytes that are not UTF-8 give U+FFFD, one for
// each maximal part of a sequence (Unicode 15, section 3.9, "U+FFFD Substitution of Maximal Subparts"). `valid` says
// whether it was UTF-8.
std::uint32_t next_code_point(std::string_view text, std::size_t& at, bool* valid = nullptr);

bool is_utf8(std::string_view text);
std::vector<std::uint32_t> code_points(std::string_view text);
std::string to_utf8(const std::vector<std::uint32_t>& codes, std::size_t begin, std::size_t end);

// The same text with what is not UTF-8 replaced by U+FFFD.
std::string valid_utf8(std::string_view bytes);

}  // namespace gptq_compile::detail
