// SPDX-License-Identifier: Apache-2.0
#include "decoder.h"

#include "bpe.h"
#include "pretokenizer.h"
#include "utf8.h"

namespace gptq_compile::detail {

namespace {

std::string joined(const std::vector<std::string>& tokens) {
  std::string out;
  for (const std::string& token : tokens) out += token;
  return out;
}

// Bytes in GPT-2's alphabet; a token with other characters stands for itself.
std::string from_byte_level(const std::vector<std::string>& tokens) {
  std::string bytes, part;
  for (const std::string& token : tokens) bytes += ByteAlphabet::get().bytes_of(token, part) ? part : token;
  return valid_utf8(bytes);
}

// The byte that a token like <0x0A> stands for, or -1.
int fallback_byte(const std::string& token) {
  if (token.size() != 6 || token.compare(0, 3, "<0x") != 0 || token[5] != '>') return -1;
  int value = 0;
  for (const char c : {token[3], token[4]}) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

// Neighbouring byte tokens become the text that they are in UTF-8, or one U+FFFD for each byte.
std::vector<std::string> from_fallback(const std::vector<std::string>& tokens) {
  std::vector<std::string> out;
  std::string bytes;
  const auto flush = [&] {
    if (!bytes.empty() && is_utf8(bytes)) {
      out.push_back(bytes);
    } else {
      for (std::size_t i = 0; i < bytes.size(); ++i) append_utf8(out.emplace_back(), kReplacement);
    }
    bytes.clear();
  };
  for (const std::string& token : tokens) {
    const int byte = fallback_byte(token);
    if (byte >= 0) {
      bytes += static_cast<char>(static_cast<unsigned char>(byte));
      continue;
    }
    flush();
    out.push_back(token);
  }
  flush();
  return out;
}

}  // namespace

Decoder::Decoder(const Json* section, const std::string& where) {
  if (section == nullptr || section->is_null()) refuse(where, "has no decoder");
  add(*section, where);
}

void Decoder::add(const Json& section, const std::string& where) {
  const std::string& type = section.at("type", where).text(where + ", decoder,");
  const auto text = [&](const Json& from, const char* name) { return from.at(name, where).text(where + ", decoder,"); };
  if (type == "ByteLevel") {
    steps_.push_back({Kind::byte_level, "", ""});
  } else if (type == "Replace" && section.at("pattern", where).find("String") != nullptr) {
    steps_.push_back({Kind::replace, text(section.at("pattern", where), "String"), text(section, "content")});
  } else if (type == "ByteFallback") {
    steps_.push_back({Kind::byte_fallback, "", ""});
  } else if (type == "Fuse") {
    steps_.push_back({Kind::fuse, "", ""});
  } else if (type == "Strip") {
    const auto count = [&](const char* name) {
      return section.at(name, where).integer(where + ", decoder,", 0, 1 << 20);
    };
    steps_.push_back({Kind::strip, text(section, "content"), "", count("start"), count("stop")});
  } else if (type == "Sequence") {
    for (const Json& each : section.at("decoders", where).list(where + ", decoders,")) add(each, where);
  } else {
    refuse(where, "has a decoder of type " + type);
  }
}

std::string Decoder::decode(std::vector<std::string> tokens) const {
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::byte_level: tokens = {from_byte_level(tokens)}; break;
      case Kind::byte_fallback: tokens = from_fallback(tokens); break;
      case Kind::fuse: tokens = {joined(tokens)}; break;
      case Kind::replace:
        for (std::string& token : tokens) token = replaced(token, step.from, step.to);
        break;
      case Kind::strip:
        for (std::string& token : tokens) {
          const std::size_t size = step.from.size();
          for (std::int64_t i = 0; i < step.start && size > 0 && token.compare(0, size, step.from) == 0; ++i)
            token.erase(0, size);
          for (std::int64_t i = 0; i < step.stop && size > 0 && token.size() >= size; ++i) {
            if (token.compare(token.size() - size, size, step.from) != 0) break;
            token.erase(token.size() - size);
          }
        }
        break;
    }
  }
  return joined(tokens);
}

}  // namespace gptq_compile::detail
