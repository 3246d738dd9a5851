// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <unordered_set>

#include "utf8.h"

namespace gptq_compile::detail {

namespace {
constexpr int kMaxDepth = 64;  // of nested lists and objects; what we read needs fewer than ten
}

class JsonParser {
 public:
  JsonParser(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  Json document() {
    Json value = parse(0);
    skip_space();
    if (at_ != text_.size()) fail("something follows the document");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(where_ + " is not valid JSON: " + what + " at byte " + std::to_string(at_) + ".");
  }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) fail("there is no value");
    at_ += word.size();
  }

  Json parse(int depth) {
    if (depth > kMaxDepth) fail("it is nested too deeply");
    skip_space();
    Json value;
    switch (peek()) {
      case '{': parse_object(value, depth); break;
      case '[': parse_list(value, depth); break;
      case '"':
        value.kind_ = Json::Kind::text;
        value.text_ = parse_text();
        break;
      case 't':
      case 'f':
        value.kind_ = Json::Kind::boolean;
        value.integer_ = peek() == 't';
        expect(value.integer_ ? "true" : "false");
        break;
      case 'n': expect("null"); break;
      default: parse_number(value);
    }
    return value;
  }

  void parse_object(Json& value, int depth) {
    value.kind_ = Json::Kind::object;
    std::unordered_set<std::string> names;
    ++at_;
    skip_space();
    if (take('}')) return;
    do {
      skip_space();
      if (peek() != '"') fail("a member has no name");
      std::string name = parse_text();
      if (!names.insert(name).second) fail("the name '" + name + "' appears twice");
      skip_space();
      if (!take(':')) fail("a colon is missing");
      value.members_.emplace_back(std::move(name), parse(depth + 1));
      skip_space();
    } while (take(','));
    if (!take('}')) fail("a comma or closing brace is missing");
  }

  void parse_list(Json& value, int depth) {
    value.kind_ = Json::Kind::list;
    ++at_;
    skip_space();
    if (take(']')) return;
    do {
      value.list_.push_back(parse(depth + 1));
      skip_space();
    } while (take(','));
    if (!take(']')) fail("a comma or closing bracket is missing");
  }

  void digits() {
    if (!std::isdigit(static_cast<unsigned char>(peek()))) fail("there is no value");
    while (std::isdigit(static_cast<unsigned char>(peek()))) ++at_;
  }

  void parse_number(Json& value) {
    const std::size_t begin = at_;
    take('-');
    if (!take('0')) digits();
    value.kind_ = Json::Kind::integer;
    if (take('.')) {
      value.kind_ = Json::Kind::real;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      value.kind_ = Json::Kind::real;
      if (!take('+')) take('-');
      digits();
    }
    const std::string number(text_.substr(begin, at_ - begin));
    value.real_ = std::strtod(number.c_str(), nullptr);
    if (value.kind_ == Json::Kind::integer) {
      errno = 0;
      value.integer_ = std::strtoll(number.c_str(), nullptr, 10);
      if (errno == ERANGE) value.kind_ = Json::Kind::real;
    }
  }

  std::uint32_t hex4() {
    if (text_.size() - at_ < 4) fail("an escape is cut off");
    std::uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = text_[at_++];
      if (!std::isxdigit(static_cast<unsigned char>(c))) fail("an escape has a digit that is not hexadecimal");
      code = code * 16 + static_cast<std::uint32_t>(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return code;
  }

  void escape(std::string& out) {
    switch (text_[at_++]) {
      case '"': out += '"'; break;
      case '\\': out += '\\'; break;
      case '/': out += '/'; break;
      case 'b': out += '\b'; break;
      case 'f': out += '\f'; break;
      case 'n': out += '\n'; break;
      case 'r': out += '\r'; break;
      case 't': out += '\t'; break;
      case 'u': {
        std::uint32_t code = hex4();
        if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
          at_ += 2;
          const std::uint32_t low = hex4();
          if (low < 0xDC00 || low > 0xDFFF) fail("half of a surrogate pair is missing");
          code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        if (code >= 0xD800 && code < 0xE000) fail("half of a surrogate pair is missing");
        append_utf8(out, code);
        break;
      }
      default: fail("there is an unknown escape");
    }
  }

  std::string parse_text() {
    std::string out;
    ++at_;
    for (;;) {
      const std::size_t begin = at_;
      while (at_ < text_.size() && text_[at_] != '"' && text_[at_] != '\\' &&
             static_cast<unsigned char>(text_[at_]) >= 32)
        ++at_;
      out.append(text_.substr(begin, at_ - begin));
      if (at_ >= text_.size()) fail("a text does not end");
      const char c = text_[at_++];
      if (c == '"') break;
      if (c != '\\') fail("a text holds a control character");
      if (at_ >= text_.size()) fail("a text does not end");
      escape(out);
    }
    if (!is_utf8(out)) fail("a text is not UTF-8");
    return out;
  }

  std::string_view text_;
  const std::string& where_;
  std::size_t at_ = 0;
};

Json Json::parse(std::string_view document, const std::string& where) { return JsonParser(document, where).document(); }

Json Json::read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " does not exist or cannot be read.");
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return parse(text, path);
}

const char* Json::kind_name() const {
  static const char* const names[] = {"null", "true/false", "a number", "a number", "text", "a list", "an object"};
  return names[static_cast<int>(kind_)];
}

namespace {
[[noreturn]] void wrong(const std::string& where, const Json& value, const char* expected) {
  throw std::runtime_error(where + " is " + value.kind_name() + ", not " + expected + ".");
}
}  // namespace

bool Json::boolean(const std::string& where) const {
  if (kind_ != Kind::boolean) wrong(where, *this, "true or false");
  return integer_ != 0;
}

std::int64_t Json::integer(const std::string& where, std::int64_t low, std::int64_t high) const {
  if (kind_ != Kind::integer) wrong(where, *this, "a whole number");
  if (integer_ < low || integer_ > high)
    throw std::runtime_error(where + " is " + std::to_string(integer_) + ", outside " + std::to_string(low) + " to " +
                             std::to_string(high) + ".");
  return integer_;
}

double Json::number(const std::string& where) const {
  if (kind_ != Kind::integer && kind_ != Kind::real) wrong(where, *this, "a number");
  return real_;
}

const std::string& Json::text(const std::string& where) const {
  if (kind_ != Kind::text) wrong(where, *this, "text");
  return text_;
}

const std::vector<Json>& Json::list(const std::string& where) const {
  if (kind_ != Kind::list) wrong(where, *this, "a list");
  return list_;
}

const std::vector<Json::Member>& Json::members(const std::string& where) const {
  if (kind_ != Kind::object) wrong(where, *this, "an object");
  return members_;
}

const Json* Json::find(std::string_view name) const {
  const auto it = std::find_if(members_.begin(), members_.end(), [&](const Member& m) { return m.first == name; });
  return it == members_.end() ? nullptr : &it->second;
}

const Json& Json::at(std::string_view name, const std::string& where) const {
  members(where);
  const Json* value = find(name);
  if (value == nullptr) throw std::runtime_error(where + " has no member '" + std::string(name) + "'.");
  return *value;
}

}  // namespace gptq_compile::detail
