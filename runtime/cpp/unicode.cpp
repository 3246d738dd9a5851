// SPDX-License-Identifier: Apache-2.0
#include "unicode.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <unordered_map>

namespace gptq_compile::detail {

namespace {

#include "unicode_categories.inc"
#include "unicode_normalization.inc"

// The value of the range that holds a code point; entries are first code point << 8 | value.
template <std::size_t N>
std::uint8_t in_ranges(const std::uint32_t (&table)[N], std::uint32_t code) {
  const std::uint32_t* after = std::upper_bound(std::begin(table), std::end(table), code << 8 | 0xFF);
  return static_cast<std::uint8_t>(after[-1] & 0xFF);
}

struct Decomposition {
  std::uint32_t first, second;
};

// Both directions of the decomposition table.
struct Mappings {
  std::unordered_map<std::uint32_t, Decomposition> decompose;
  std::unordered_map<std::uint64_t, std::uint32_t> compose;

  Mappings() {
    for (std::size_t i = 0; i < std::size(kDecompositions); i += 3) {
      const std::uint32_t code = kDecompositions[i] >> 1, first = kDecompositions[i + 1],
                          second = kDecompositions[i + 2];
      decompose[code] = {first, second};
      if ((kDecompositions[i] & 1) != 0) compose[std::uint64_t{first} << 32 | second] = code;
    }
  }
};

const Mappings& mappings() {
  static const Mappings instance;
  return instance;
}

// Hangul syllables are composed by arithmetic (Unicode 15, section 3.12).
constexpr std::uint32_t kS = 0xAC00, kL = 0x1100, kV = 0x1161, kT = 0x11A7, kVs = 21, kTs = 28, kLs = 19;
constexpr std::uint32_t kSs = kLs * kVs * kTs;

void decompose(std::uint32_t code, std::vector<std::uint32_t>& out) {
  if (code >= kS && code < kS + kSs) {
    const std::uint32_t index = code - kS;
    out.push_back(kL + index / (kVs * kTs));
    out.push_back(kV + index % (kVs * kTs) / kTs);
    if (index % kTs != 0) out.push_back(kT + index % kTs);
    return;
  }
  const auto found = mappings().decompose.find(code);
  if (found == mappings().decompose.end()) {
    out.push_back(code);
    return;
  }
  decompose(found->second.first, out);
  if (found->second.second != 0) out.push_back(found->second.second);
}

// The code point that a pair composes to, or 0.
std::uint32_t compose(std::uint32_t a, std::uint32_t b) {
  if (a >= kL && a < kL + kLs && b >= kV && b < kV + kVs) return kS + ((a - kL) * kVs + (b - kV)) * kTs;
  if (a >= kS && a < kS + kSs && (a - kS) % kTs == 0 && b > kT && b < kT + kTs) return a + (b - kT);
  const auto found = mappings().compose.find(std::uint64_t{a} << 32 | b);
  return found == mappings().compose.end() ? 0 : found->second;
}

}  // namespace

Category category_of(std::uint32_t code) { return static_cast<Category>(in_ranges(kCategories, code)); }

bool is_space(std::uint32_t code) { return std::binary_search(std::begin(kSpaces), std::end(kSpaces), code); }

std::uint32_t category_mask(std::string_view name) {
  static const char* const names[] = {"Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd",
                                      "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm",
                                      "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co"};
  std::uint32_t mask = 0;
  for (std::size_t i = 0; i < std::size(names); ++i)
    if (name == names[i] || (name.size() == 1 && name[0] == names[i][0])) mask |= std::uint32_t{1} << i;
  return mask;
}

std::vector<std::uint32_t> nfc(const std::vector<std::uint32_t>& codes) {
  // Below U+0300 everything is composed and nothing combines.
  if (std::all_of(codes.begin(), codes.end(), [](std::uint32_t c) { return c < 0x300; })) return codes;
  std::vector<std::uint32_t> parts;
  parts.reserve(codes.size());
  for (const std::uint32_t code : codes) decompose(code, parts);
  const auto combining = [](std::uint32_t c) { return in_ranges(kCombining, c); };
  // Canonical ordering: marks between two starters, by class, stable.
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (combining(parts[i]) == 0) continue;
    std::size_t end = i;
    while (end < parts.size() && combining(parts[end]) != 0) ++end;
    std::stable_sort(parts.begin() + static_cast<std::ptrdiff_t>(i), parts.begin() + static_cast<std::ptrdiff_t>(end),
                     [&](std::uint32_t a, std::uint32_t b) { return combining(a) < combining(b); });
    i = end - 1;
  }
  // A mark joins the last starter unless something of its class or above stands between them.
  std::vector<std::uint32_t> out;
  std::size_t starter = 0;
  bool has_starter = false;
  for (const std::uint32_t code : parts) {
    const std::uint8_t kind = combining(code);
    if (has_starter) {
      const bool adjacent = starter + 1 == out.size();
      const std::uint8_t last = combining(out.back());
      if (adjacent || (last != 0 && last < kind)) {
        const std::uint32_t joined = compose(out[starter], code);
        if (joined != 0) {
          out[starter] = joined;
          continue;
        }
      }
    }
    if (kind == 0) {
      starter = out.size();
      has_starter = true;
    }
    out.push_back(code);
  }
  return out;
}

}  // namespace gptq_compile::detail
