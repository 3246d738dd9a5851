// SPDX-License-Identifier: Apache-2.0
// A small JSON reader (RFC 8259): manifests, safetensors headers, tokenizer.json.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gptq_compile::detail {

// One JSON value. Objects keep the order of their members; a name that appears twice is an error.
class Json {
 public:
  enum class Kind { null, boolean, integer, real, text, list, object };
  using Member = std::pair<std::string, Json>;

  // Parses a whole document; `where` (a path) is put before every complaint.
  static Json parse(std::string_view document, const std::string& where);
  // Reads and parses a file.
  static Json read(const std::string& path);

  Kind kind() const { return kind_; }
  bool is_null() const { return kind_ == Kind::null; }
  const char* kind_name() const;  // "an object", "text", ... for messages

  // Checked access: each throws std::runtime_error saying which field is what.
  bool boolean(const std::string& where) const;
  std::int64_t integer(const std::string& where, std::int64_t low, std::int64_t high) const;
  double number(const std::string& where) const;  // integer or real
  const std::string& text(const std::string& where) const;
  const std::vector<Json>& list(const std::string& where) const;
  const std::vector<Member>& members(const std::string& where) const;

  // A member of an object; `find` is null where there is none (or this is no object), `at` throws.
  const Json* find(std::string_view name) const;
  const Json& at(std::string_view name, const std::string& where) const;

 private:
  friend class JsonParser;
  Kind kind_ = Kind::null;
  std::int64_t integer_ = 0;  // also the value of a boolean
  double real_ = 0;
  std::string text_;
  std::vector<Json> list_;
  std::vector<Member> members_;
};

}  // namespace gptq_compile::detail
