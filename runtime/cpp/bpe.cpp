// SPDX-License-Identifier: Apache-2.0
#include "bpe.h"

#include <limits>
#include <queue>
#include <stdexcept>
#include <tuple>

#include "utf8.h"

namespace gptq_compile::detail {

namespace {

constexpr std::int64_t kMaxGap = 1 << 20;  // ids are dense but for a few reserved ones

bool is_set(const Json* value) {
  return value != nullptr && !value->is_null() && !(value->kind() == Json::Kind::text && value->text("").empty());
}

}  // namespace

void refuse(const std::string& where, const std::string& what) {
  throw std::runtime_error(where + " " + what +
                           ", which the C++ tokenizer does not do. Use token ids, or the Python runtime.");
}

const ByteAlphabet& ByteAlphabet::get() {
  static const ByteAlphabet alphabet;
  return alphabet;
}

ByteAlphabet::ByteAlphabet() {
  std::uint32_t next = 256;
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    codes_[byte] = printable ? byte : next++;
    bytes_[codes_[byte]] = static_cast<unsigned char>(byte);
  }
}

bool ByteAlphabet::bytes_of(std::string_view token, std::string& bytes) const {
  bytes.clear();
  for (std::size_t at = 0; at < token.size();) {
    const auto found = bytes_.find(next_code_point(token, at));
    if (found == bytes_.end()) return false;
    bytes += static_cast<char>(found->second);
  }
  return true;
}

Bpe::Bpe(const Json& model, const std::string& where) {
  const Json* type = model.find("type");
  if (type != nullptr && type->text(where + ", model.type,") != "BPE")
    refuse(where, "has a model of type " + type->text(""));
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix", "dropout", "unk_token"})
    if (is_set(model.find(name))) refuse(where, std::string("sets the model's ") + name);
  const Json* fallback = model.find("byte_fallback");
  if (fallback != nullptr && !fallback->is_null() && fallback->boolean(where + ", model.byte_fallback,"))
    refuse(where, "sets the model's byte_fallback");
  read_vocabulary(model, where);
  read_merges(model, where);
  const Json* ignore = model.find("ignore_merges");
  if (ignore == nullptr || ignore->is_null() || !ignore->boolean(where + ", model.ignore_merges,")) return;
  std::string bytes;
  for (const auto& [text, id] : vocabulary_)
    if (ByteAlphabet::get().bytes_of(text, bytes)) whole_[bytes] = id;
}

void Bpe::read_vocabulary(const Json& model, const std::string& where) {
  const auto& entries = model.at("vocab", where).members(where + ", model.vocab,");
  vocabulary_.reserve(entries.size());
  for (const auto& [text, value] : entries) {
    const std::int64_t id = value.integer(where + ", token '" + text + "',", 0, kMaxToken);
    if (id > static_cast<std::int64_t>(entries.size()) + kMaxGap)
      refuse(where, "has token ids far beyond its vocabulary's size");
    if (static_cast<std::size_t>(id) >= tokens_.size()) tokens_.resize(static_cast<std::size_t>(id) + 1, nullptr);
    tokens_[static_cast<std::size_t>(id)] = &vocabulary_.emplace(text, static_cast<std::int32_t>(id)).first->first;
  }
  std::string text;
  for (std::size_t byte = 0; byte < 256; ++byte) {
    text.clear();
    append_utf8(text, ByteAlphabet::get().code_of(static_cast<unsigned char>(byte)));
    const auto found = vocabulary_.find(text);
    byte_tokens_[byte] = found == vocabulary_.end() ? -1 : found->second;
  }
}

void Bpe::read_merges(const Json& model, const std::string& where) {
  const auto& merges = model.at("merges", where).list(where + ", model.merges,");
  merges_.reserve(merges.size());
  std::int32_t rank = 0;
  for (const Json& merge : merges) {
    std::string first, second;
    if (merge.kind() == Json::Kind::list) {
      const auto& both = merge.list("");
      if (both.size() != 2) throw std::runtime_error(where + " has a merge that is not a pair.");
      first = both[0].text(where + ", a merge,");
      second = both[1].text(where + ", a merge,");
    } else {
      const std::string& both = merge.text(where + ", a merge,");
      const std::size_t space = both.find(' ');
      if (space == std::string::npos || both.find(' ', space + 1) != std::string::npos)
        throw std::runtime_error(where + " has the merge '" + both +
                                 "', which is not two tokens with a space between.");
      first = both.substr(0, space);
      second = both.substr(space + 1);
    }
    const auto a = vocabulary_.find(first), b = vocabulary_.find(second), joined = vocabulary_.find(first + second);
    if (a == vocabulary_.end() || b == vocabulary_.end() || joined == vocabulary_.end())
      throw std::runtime_error(where + " merges '" + first + "' and '" + second +
                               "', which are not all in its vocabulary.");
    merges_[pair(a->second, b->second)] = {rank++, joined->second};
  }
}

const std::string* Bpe::token(std::int32_t id) const {
  const auto index = static_cast<std::size_t>(id);
  return id >= 0 && index < tokens_.size() ? tokens_[index] : nullptr;
}

void Bpe::encode(std::string_view piece, std::vector<std::int32_t>& out) const {
  if (!whole_.empty()) {
    const auto found = whole_.find(std::string(piece));
    if (found != whole_.end()) {
      out.push_back(found->second);
      return;
    }
  }
  constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
  struct Symbol {
    std::int32_t token;
    std::size_t previous, next;
    bool alive;
  };
  std::vector<Symbol> symbols;
  symbols.reserve(piece.size());
  for (const char c : piece) {
    const std::int32_t token = byte_tokens_[static_cast<unsigned char>(c)];
    if (token < 0) continue;
    const std::size_t index = symbols.size();
    symbols.push_back({token, index == 0 ? none : index - 1, none, true});
    if (index > 0) symbols[index - 1].next = index;
  }
  // The merge of lowest rank first, of those the leftmost. Entries that a later merge made stale are recognized by
  // their result.
  using Entry = std::tuple<std::int32_t, std::size_t, std::int32_t>;  // rank, left symbol, resulting token
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> queue;
  const auto consider = [&](std::size_t left) {
    if (left == none || symbols[left].next == none) return;
    const auto found = merges_.find(pair(symbols[left].token, symbols[symbols[left].next].token));
    if (found != merges_.end()) queue.emplace(found->second.rank, left, found->second.token);
  };
  for (std::size_t i = 0; i + 1 < symbols.size(); ++i) consider(i);
  while (!queue.empty()) {
    const auto [rank, left, token] = queue.top();
    queue.pop();
    Symbol& symbol = symbols[left];
    if (!symbol.alive || symbol.next == none) continue;
    Symbol& right = symbols[symbol.next];
    const auto found = merges_.find(pair(symbol.token, right.token));
    if (found == merges_.end() || found->second.token != token) continue;
    symbol.token = token;
    right.alive = false;
    symbol.next = right.next;
    if (right.next != none) symbols[right.next].previous = left;
    consider(symbol.previous);
    consider(left);
  }
  for (const Symbol& symbol : symbols)
    if (symbol.alive) out.push_back(symbol.token);
}

}  // namespace gptq_compile::detail
