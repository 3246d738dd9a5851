// SPDX-License-Identifier: Apache-2.0
#include "regex.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "unicode.h"
#include "utf8.h"

namespace gptq_compile::detail {

namespace {
constexpr std::uint32_t kLongS = 0x17F, kKelvin = 0x212A;  // fold to s and k
constexpr std::size_t kNoLimit = std::numeric_limits<std::size_t>::max();

bool is_letter(std::uint32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
}  // namespace

bool CharSet::listed(std::uint32_t code) const {
  for (const auto& [first, last] : ranges)
    if (code >= first && code <= last) return true;
  if ((categories | not_categories) != 0) {
    const std::uint32_t bit = std::uint32_t{1} << category_of(code);
    if ((categories & bit) != 0 || (not_categories != 0 && (not_categories & bit) == 0)) return true;
  }
  return (space || not_space) && (is_space(code) ? space : not_space);
}

bool CharSet::has(std::uint32_t code) const {
  bool found = listed(code);
  if (!found && ignore_case) {
    if (is_letter(code)) found = listed(code ^ 32);
    if (code == kLongS || code == 's' || code == 'S') found = found || listed('s') || listed('S') || listed(kLongS);
    if (code == kKelvin || code == 'k' || code == 'K') found = found || listed('k') || listed('K') || listed(kKelvin);
  }
  return found != negated;
}

// Builds nodes from the end of the pattern backwards in effect: each item is made with the node that follows it filled
// in by `link`.
class RegexParser {
 public:
  RegexParser(const std::string& pattern, Regex& regex)
      : pattern_(pattern), codes_(code_points(pattern)), regex_(regex) {}

  void parse() {
    const Chain chain = alternatives(false);
    if (at_ != codes_.size()) fail("has a closing parenthesis too many");
    regex_.start_ = chain.first;
  }

 private:
  using Node = Regex::Node;
  using Kind = Regex::Kind;
  // A piece of the graph: its first node and the nodes whose `next` is still open. An empty piece has no nodes.
  struct Chain {
    std::size_t first = Regex::kAccept;
    std::vector<std::size_t> open;
  };

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("The tokenizer's pattern " + pattern_ + " " + what +
                             ", which the C++ tokenizer does not do. Use token ids, or the Python runtime.");
  }

  bool more() const { return at_ < codes_.size(); }
  std::uint32_t peek(std::size_t ahead = 0) const { return at_ + ahead < codes_.size() ? codes_[at_ + ahead] : 0; }
  bool take(char c) {
    if (!more() || codes_[at_] != static_cast<unsigned char>(c)) return false;
    ++at_;
    return true;
  }
  bool take(const char* word) {
    std::size_t n = 0;
    for (; word[n] != '\0'; ++n)
      if (peek(n) != static_cast<unsigned char>(word[n])) return false;
    at_ += n;
    return true;
  }

  std::size_t add(Node node) {
    regex_.nodes_.push_back(std::move(node));
    return regex_.nodes_.size() - 1;
  }
  void link(const Chain& chain, std::size_t next) {
    for (const std::size_t node : chain.open) regex_.nodes_[node].next = next;
  }
  Chain single(Node node) {
    const std::size_t index = add(std::move(node));
    return {index, {index}};
  }

  Chain sequence(bool ignore_case) {
    Chain all;
    while (more() && peek() != '|' && peek() != ')') {
      const Chain item = quantified(ignore_case);
      if (item.open.empty()) continue;  // an empty group
      if (all.open.empty()) {
        all = item;
      } else {
        link(all, item.first);
        all.open = item.open;
      }
    }
    return all;
  }

  // A choice's `next` is what follows an empty alternative; the others' last nodes are linked to it as well.
  Chain alternatives(bool ignore_case) {
    std::vector<Chain> branches{sequence(ignore_case)};
    while (take('|')) branches.push_back(sequence(ignore_case));
    return branches.size() == 1 ? branches[0] : choice(branches);
  }

  Chain choice(const std::vector<Chain>& branches) {
    Node node;
    node.kind = Kind::choice;
    for (const Chain& branch : branches) node.branches.push_back(branch.first);
    Chain result = single(std::move(node));
    for (const Chain& branch : branches) result.open.insert(result.open.end(), branch.open.begin(), branch.open.end());
    return result;
  }

  Chain quantified(bool ignore_case) {
    const std::size_t before = regex_.nodes_.size();
    Chain item = atom(ignore_case);
    std::size_t min = 1, max = 1;
    if (take('?')) {
      min = 0;
    } else if (take('*')) {
      min = 0;
      max = kNoLimit;
    } else if (take('+')) {
      max = kNoLimit;
    } else if (peek() == '{' && peek(1) >= '0' && peek(1) <= '9') {
      ++at_;
      min = max = number();
      if (take(',')) max = peek() == '}' ? kNoLimit : number();
      if (!take('}') || max < min) fail("has a malformed {..}");
    } else {
      return item;
    }
    Regex::Greed greed = Regex::Greed::greedy;
    if (take('?')) greed = Regex::Greed::lazy;
    if (take('+')) greed = Regex::Greed::possessive;
    if (peek() == '?' || peek() == '*' || peek() == '+') fail("repeats a repetition");
    const bool one = regex_.nodes_.size() == before + 1 && regex_.nodes_.back().kind == Kind::set;
    if (one) {
      Node& node = regex_.nodes_.back();
      node.kind = Kind::repeat;
      node.min = min;
      node.max = max;
      node.greed = greed;
      return item;
    }
    if (min != 0 || max != 1 || greed == Regex::Greed::possessive) fail("repeats a group");
    return greed == Regex::Greed::greedy ? choice({item, Chain{}}) : choice({Chain{}, item});
  }

  std::size_t number() {
    std::size_t value = 0;
    while (peek() >= '0' && peek() <= '9' && value < 1000) value = value * 10 + (codes_[at_++] - '0');
    return value;
  }

  Chain atom(bool ignore_case) {
    if (take('(')) return group(ignore_case);
    Node node;
    node.set.ignore_case = ignore_case;
    if (take('[')) {
      char_class(node.set);
    } else if (take('.')) {
      node.set.ranges = {{'\n', '\n'}};
      node.set.negated = true;
    } else if (take('\\')) {
      escape(node.set);
    } else if (peek() == '^' || peek() == '$' || peek() == '*' || peek() == '+' || peek() == '?') {
      fail("has an anchor or a quantifier of nothing");
    } else {
      add_literal(node.set, codes_[at_++]);
    }
    return single(std::move(node));
  }

  Chain group(bool ignore_case) {
    Node look;
    look.kind = Kind::look;
    bool is_look = false;
    if (take("?i:")) {
      ignore_case = true;
    } else if (take("?!")) {
      is_look = look.negated = true;
    } else if (take("?=")) {
      is_look = true;
    } else if (!take("?:") && peek() == '?') {
      fail("has a kind of group");
    }
    const Chain inside = alternatives(ignore_case);
    if (!take(')')) fail("has a group that does not end");
    if (!is_look) return inside;
    look.branches.push_back(inside.first);  // its open ends accept
    return single(std::move(look));
  }

  void add_literal(CharSet& set, std::uint32_t code) {
    if (set.ignore_case && code >= 0x80) fail("ignores the case of a letter beyond ASCII");
    set.ranges.emplace_back(code, code);
  }

  // The code point of an escaped literal; `known` is false for a class like \s, which is added to the set.
  std::uint32_t escape(CharSet& set, bool* known = nullptr) {
    if (!more()) fail("ends in a backslash");
    const std::uint32_t code = codes_[at_++];
    if (known != nullptr) *known = false;
    switch (code) {
      case 's': set.space = true; return 0;
      case 'S': set.not_space = true; return 0;
      case 'd': set.categories |= category_mask("Nd"); return 0;
      case 'p':
      case 'P': property(set, code == 'P'); return 0;
      default: break;
    }
    std::uint32_t value = code;
    if (code == 'n')
      value = '\n';
    else if (code == 'r')
      value = '\r';
    else if (code == 't')
      value = '\t';
    else if (code == 'f')
      value = '\f';
    else if (code == 'v')
      value = '\v';
    else if (code >= 0x80 || is_letter(code) || (code >= '0' && code <= '9'))
      fail("has the escape \\" + std::string(1, static_cast<char>(code)));
    if (known != nullptr)
      *known = true;
    else
      add_literal(set, value);
    return value;
  }

  void property(CharSet& set, bool negated) {
    if (!take('{')) fail("has a \\p without braces");
    if (take('^')) negated = !negated;
    std::string name;
    while (more() && peek() != '}') append_utf8(name, codes_[at_++]);
    const std::uint32_t mask = category_mask(name);
    if (!take('}') || mask == 0) fail("has the property " + name);
    if (negated && set.not_categories != 0) fail("has two negated properties in one class");
    (negated ? set.not_categories : set.categories) |= mask;
  }

  void char_class(CharSet& set) {
    set.negated = take('^');
    bool first = true;
    while (!take(']') || first) {
      if (!more()) fail("has a class that does not end");
      if (peek() == '[' || (peek() == '&' && peek(1) == '&')) fail("has a class inside a class");
      if (first && peek() == ']') fail("has a class that begins with a bracket");
      first = false;
      bool literal = true;
      std::uint32_t low = codes_[at_++];
      if (low == '\\') low = escape(set, &literal);
      if (!literal) continue;
      std::uint32_t high = low;
      if (peek() == '-' && peek(1) != ']' && at_ + 1 < codes_.size()) {
        ++at_;
        high = codes_[at_++];
        if (high == '\\') high = escape(set, &literal);
        if (!literal || high < low) fail("has a malformed range");
        if (set.ignore_case && high >= 0x80) fail("ignores the case of a letter beyond ASCII");
      }
      if (high == low)
        add_literal(set, low);
      else
        set.ranges.emplace_back(low, high);
    }
  }

  const std::string& pattern_;
  std::vector<std::uint32_t> codes_;
  Regex& regex_;
  std::size_t at_ = 0;
};

Regex::Regex(const std::string& pattern) { RegexParser(pattern, *this).parse(); }

Regex Regex::literal(const std::string& text) {
  Regex regex;
  for (const std::uint32_t code : code_points(text)) {
    Node node;
    node.set.ranges = {{code, code}};
    node.next = regex.nodes_.size() + 1;
    regex.nodes_.push_back(std::move(node));
  }
  if (regex.nodes_.empty()) return regex;
  regex.nodes_.back().next = kAccept;
  regex.start_ = 0;
  return regex;
}

std::size_t Regex::run(std::size_t index, std::size_t at, const Text& text) const {
  // The recursion is as deep as the pattern is long: repetitions of single characters loop.
  while (index != kAccept) {
    const Node& node = nodes_[index];
    switch (node.kind) {
      case Kind::set:
        if (at >= text.end || !node.set.has(text.codes[at])) return kFail;
        ++at;
        break;
      case Kind::look: {
        const bool found = run(node.branches[0], at, text) != kFail;
        if (found == node.negated) return kFail;
        break;
      }
      case Kind::choice:
        for (const std::size_t branch : node.branches) {
          const std::size_t end = run(branch == kAccept ? node.next : branch, at, text);
          if (end != kFail) return end;
        }
        return kFail;
      case Kind::repeat: {
        const std::size_t most = std::min(node.max, text.end - at);
        std::size_t count = 0;
        const std::size_t wanted = node.greed == Greed::lazy ? std::min(node.min, most) : most;
        while (count < wanted && node.set.has(text.codes[at + count])) ++count;
        if (count < node.min) return kFail;
        if (node.greed == Greed::possessive) {
          at += count;
          break;
        }
        for (;;) {
          const std::size_t end = run(node.next, at + count, text);
          if (end != kFail) return end;
          if (node.greed == Greed::greedy) {
            if (count-- == node.min) return kFail;
          } else {
            if (count == most || !node.set.has(text.codes[at + count])) return kFail;
            ++count;
          }
        }
      }
    }
    index = node.next;
  }
  return at;
}

std::vector<Regex::Span> Regex::matches(const std::vector<std::uint32_t>& text, std::size_t begin,
                                        std::size_t end) const {
  std::vector<Span> found;
  const Text whole{text, end};
  for (std::size_t at = begin; at < end;) {
    const std::size_t stop = run(start_, at, whole);
    if (stop == kFail || stop == at) {
      ++at;
      continue;
    }
    found.emplace_back(at, stop);
    at = stop;
  }
  return found;
}

}  // namespace gptq_compile::detail
