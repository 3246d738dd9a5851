// SPDX-License-Identifier: Apache-2.0
// The regular expressions of pre-tokenizers, over code points.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace gptq_compile::detail {

// Characters that a step of a pattern takes.
struct CharSet {
  std::vector<std::pair<std::uint32_t, std::uint32_t>> ranges;  // first and last
  std::uint32_t categories = 0, not_categories = 0;             // \p{..} and \P{..}, one bit each
  bool space = false, not_space = false;                        // \s and \S
  bool negated = false, ignore_case = false;

  bool has(std::uint32_t code) const;

 private:
  bool listed(std::uint32_t code) const;
};

// What the published pre-tokenizers use of Oniguruma's syntax: literals, classes, \p{..}, \s, groups, (?i:..),
// lookahead, alternatives, and quantifiers of single characters (greedy, lazy, possessive). Anything else is refused
// when the pattern is read. Alternatives are tried in order and the first that matches wins.
class Regex {
 public:
  explicit Regex(const std::string& pattern);
  static Regex literal(const std::string& text);

  using Span = std::pair<std::size_t, std::size_t>;  // begin and end
  // All matches from the left that are not empty, none overlapping.
  std::vector<Span> matches(const std::vector<std::uint32_t>& text, std::size_t begin, std::size_t end) const;

 private:
  friend class RegexParser;
  enum class Kind { set, repeat, choice, look };
  enum class Greed { greedy, lazy, possessive };
  static constexpr std::size_t kAccept = static_cast<std::size_t>(-1);
  struct Node {
    Kind kind = Kind::set;
    std::size_t next = kAccept;  // the node that follows
    CharSet set;
    std::size_t min = 1, max = 1;  // repeat
    Greed greed = Greed::greedy;
    std::vector<std::size_t> branches;  // choice: first node of each alternative; look: the one
    bool negated = false;               // look
  };
  struct Text {
    const std::vector<std::uint32_t>& codes;
    std::size_t end;
  };
  static constexpr std::size_t kFail = static_cast<std::size_t>(-1);

  Regex() = default;
  std::size_t run(std::size_t node, std::size_t at, const Text& text) const;  // the end of the match, or kFail

  std::vector<Node> nodes_;
  std::size_t start_ = kAccept;
};

}  // namespace gptq_compile::detail
