// SPDX-License-Identifier: Apache-2.0
#include "added_tokens.h"

#include <algorithm>

#include "bpe.h"
#include "unicode.h"
#include "utf8.h"

namespace gptq_compile::detail {

namespace {

// Bytes of white space at the beginning and at the end of a text.
std::size_t space_at_start(std::string_view text) {
  std::size_t at = 0;
  for (std::size_t next = 0; next < text.size(); at = next)
    if (!is_space(next_code_point(text, next))) break;
  return at;
}

std::size_t space_at_end(std::string_view text) {
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();)
    if (!is_space(next_code_point(text, at))) begin = at;
  return text.size() - begin;
}

}  // namespace

AddedTokens::AddedTokens(const Json* section, const Normalizer& normalizer, const std::string& where) {
  if (section == nullptr || section->is_null()) return;
  for (const Json& entry : section->list(where + ", added_tokens,")) {
    const std::string name = where + ", an added token,";
    const auto flag = [&](const char* key) { return entry.at(key, name).boolean(name); };
    const std::string& text = entry.at("content", name).text(name);
    if (text.empty()) continue;
    const auto id = static_cast<std::int32_t>(entry.at("id", name).integer(name, 0, kMaxToken));
    if (flag("single_word")) refuse(where, "has the added token " + text + " that must stand as a word by itself");
    const bool normalized = flag("normalized");
    const std::string searched = normalized ? normalizer.apply(text) : text;
    by_id_[id] = {text, flag("special")};
    (normalized ? normalized_ : raw_)[searched[0]].push_back({searched, id, flag("lstrip"), flag("rstrip")});
  }
  for (Finder* finder : {&raw_, &normalized_})
    for (auto& [first, tokens] : *finder)
      std::stable_sort(tokens.begin(), tokens.end(),
                       [](const Token& a, const Token& b) { return a.text.size() > b.text.size(); });
}

void AddedTokens::find(const Finder& finder, std::string_view text, std::vector<Piece>& out) {
  std::size_t done = 0;
  for (std::size_t at = 0; !finder.empty() && at < text.size();) {
    const auto bucket = finder.find(text[at]);
    const Token* found = nullptr;
    if (bucket != finder.end())
      for (const Token& token : bucket->second)
        if (text.compare(at, token.text.size(), token.text) == 0) {
          found = &token;
          break;
        }
    if (found == nullptr) {
      ++at;
      continue;
    }
    std::size_t begin = at, end = at + found->text.size();
    at = end;
    if (found->left) begin = std::max(begin - space_at_end(text.substr(0, begin)), done);
    if (found->right) end += space_at_start(text.substr(end));
    if (done < begin) out.push_back({std::string(text.substr(done, begin - done)), -1});
    out.push_back({found->text, found->id});
    // Backwards where white space that the token before took is a token itself: `tokenizers` counts it twice.
    done = end;
  }
  if (done < text.size()) out.push_back({std::string(text.substr(done)), -1});
}

std::vector<AddedTokens::Piece> AddedTokens::split(std::string_view text, const Normalizer& normalizer) const {
  std::vector<Piece> raw, out;
  find(raw_, text, raw);
  for (Piece& piece : raw) {
    if (piece.id >= 0)
      out.push_back(std::move(piece));
    else
      find(normalized_, normalizer.apply(piece.text), out);
  }
  return out;
}

const std::string* AddedTokens::token(std::int32_t id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : &found->second.text;
}

bool AddedTokens::is_special(std::int32_t id) const {
  const auto found = by_id_.find(id);
  return found != by_id_.end() && found->second.special;
}

}  // namespace gptq_compile::detail
