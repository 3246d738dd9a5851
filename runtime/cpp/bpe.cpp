// SPDX-License-Identifier: Apache-2.0
#include "bpe.h"

#include <algorithm>
#include <functional>
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

Bpe::Bpe(const Json& model, bool byte_level, const std::string& where) : byte_level_(byte_level) {
  const Json* type = model.find("type");
  if (type != nullptr && type->text(where + ", model.type,") != "BPE")
    refuse(where, "has a model of type " + type->text(""));
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix", "dropout"})
    if (is_set(model.find(name))) refuse(where, std::string("sets the model's ") + name);
  const auto flag = [&](const char* name) {
    const Json* value = model.find(name);
    return value != nullptr && !value->is_null() && value->boolean(where + ", model." + name + ",");
  };
  fallback_for_unknown_ = flag("byte_fallback");
  fuse_unknown_ = flag("fuse_unk");
  read_vocabulary(model, where);
  read_merges(model, where);
  if (is_set(model.find("unk_token"))) {
    const auto found = vocabulary_.find(model.find("unk_token")->text(where + ", model.unk_token,"));
    if (found == vocabulary_.end())
      throw std::runtime_error(where + " has an unk_token that is not in its vocabulary.");
    unknown_ = found->second;
  }
  if (!flag("ignore_merges")) return;
  std::string bytes;
  for (const auto& [text, id] : vocabulary_) {
    if (!byte_level_)
      whole_[text] = id;
    else if (ByteAlphabet::get().bytes_of(text, bytes))
      whole_[bytes] = id;
  }
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
    const std::string digits = "0123456789ABCDEF";
    const auto named = vocabulary_.find(std::string("<0x") + digits[byte / 16] + digits[byte % 16] + ">");
    fallback_[byte] = named == vocabulary_.end() ? -1 : named->second;
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

std::vector<std::int32_t> Bpe::units(std::string_view piece) const {
  std::vector<std::int32_t> tokens;
  tokens.reserve(piece.size());
  std::size_t pending = 0;  // unknown characters whose token is not out yet; as `tokenizers`, behind fallback bytes
  const auto put_pending = [&] {
    if (pending > 0) tokens.push_back(unknown_);
    pending = 0;
  };
  std::string text;
  for (std::size_t at = 0; at < piece.size();) {
    std::int32_t token = -1;
    if (byte_level_) {
      const auto byte = static_cast<unsigned char>(piece[at++]);
      token = byte_tokens_[byte];
      if (token < 0) append_utf8(text = "", ByteAlphabet::get().code_of(byte));
    } else {
      const std::size_t begin = at;
      next_code_point(piece, at);
      text = piece.substr(begin, at - begin);
      const auto found = vocabulary_.find(text);
      if (found != vocabulary_.end()) token = found->second;
    }
    if (token >= 0) {
      put_pending();
      tokens.push_back(token);
      continue;
    }
    const auto has_fallback = [this](char c) { return fallback_[static_cast<unsigned char>(c)] >= 0; };
    if (fallback_for_unknown_ && std::all_of(text.begin(), text.end(), has_fallback)) {
      for (const char c : text) tokens.push_back(fallback_[static_cast<unsigned char>(c)]);
    } else if (unknown_ >= 0) {
      if (!fuse_unknown_) put_pending();
      ++pending;
    }
  }
  put_pending();
  return tokens;
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
  for (const std::int32_t token : units(piece)) {
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
