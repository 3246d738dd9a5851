// SPDX-License-Identifier: Apache-2.0
// What a tokenizer needs to know of Unicode: general categories, white space, canonical composition.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace gptq_compile::detail {

// General categories (Unicode 15, section 4.5). Cn: unassigned, and everything else.
// clang-format off
enum Category : std::uint8_t {
  Cn, Lu, Ll, Lt, Lm, Lo, Mn, Mc, Me, Nd, Nl, No, Pc, Pd, Ps, Pe, Pi, Pf, Po, Sm, Sc, Sk, So, Zs, Zl, Zp, Cc, Cf, Co
};
// clang-format on

Category category_of(std::uint32_t code);
bool is_space(std::uint32_t code);  // White_Space
inline bool is_number(std::uint32_t code) {
  const Category c = category_of(code);
  return c == Nd || c == Nl || c == No;
}

// The categories that a name like "L" or "Lu" stands for, one bit each; 0 if there is no such name.
std::uint32_t category_mask(std::string_view name);

// Normalization form C (Unicode Standard Annex 15).
std::vector<std::uint32_t> nfc(const std::vector<std::uint32_t>& codes);

}  // namespace gptq_compile::detail
