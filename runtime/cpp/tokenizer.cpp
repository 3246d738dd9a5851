// SPDX-License-Identifier: Apache-2.0
#include "added_tokens.h"
#include "bpe.h"
#include "decoder.h"
#include "gptq_compile.h"
#include "json.h"
#include "pretokenizer.h"
#include "utf8.h"

namespace gptq_compile {

using detail::Json;

struct Tokenizer::Impl {
  Impl(const Json& document, const std::string& path)
      : normalizer(document.find("normalizer"), path),
        pre_tokenizer(document.find("pre_tokenizer"), path),
        added(document.find("added_tokens"), normalizer, path),
        bpe(document.at("model", path), pre_tokenizer.byte_level(), path),
        decoder(document.find("decoder"), path) {}

  detail::Normalizer normalizer;
  detail::PreTokenizer pre_tokenizer;
  detail::AddedTokens added;
  detail::Bpe bpe;
  detail::Decoder decoder;
};

Tokenizer::Tokenizer(const std::string& path) : impl_(std::make_unique<Impl>(Json::read(path), path)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<std::int32_t> ids;
  const std::string valid = detail::valid_utf8(text);
  for (const auto& piece : impl_->added.split(valid, impl_->normalizer)) {
    if (piece.id >= 0) {
      ids.push_back(piece.id);
      continue;
    }
    for (const std::string& word : impl_->pre_tokenizer.split(piece.text)) impl_->bpe.encode(word, ids);
  }
  return ids;
}

std::string Tokenizer::decode(const std::vector<std::int32_t>& ids, bool skip_special_tokens) const {
  std::vector<std::string> tokens;
  for (const std::int32_t id : ids) {
    if (skip_special_tokens && impl_->added.is_special(id)) continue;
    const std::string* token = impl_->added.token(id);
    if (token == nullptr) token = impl_->bpe.token(id);
    if (token != nullptr) tokens.push_back(*token);
  }
  return impl_->decoder.decode(std::move(tokens));
}

}  // namespace gptq_compile
