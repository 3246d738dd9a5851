// SPDX-License-Identifier: Apache-2.0
#include "pretokenizer.h"

#include <utility>

#include "bpe.h"
#include "unicode.h"
#include "utf8.h"

namespace gptq_compile::detail {

namespace {

// GPT-2's own pattern, which ByteLevel uses unless told otherwise.
const char* const kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

const std::string& type_of(const Json& section, const std::string& where) {
  return section.at("type", where).text(where + ", type,");
}

bool flag(const Json& section, const char* name, bool otherwise, const std::string& where) {
  const Json* value = section.find(name);
  return value == nullptr || value->is_null() ? otherwise : value->boolean(where + ", " + name + ",");
}

}  // namespace

std::string replaced(std::string_view text, const std::string& from, const std::string& to) {
  std::string out;
  std::size_t at = 0;
  for (std::size_t found; !from.empty() && (found = text.find(from, at)) != std::string_view::npos;
       at = found + from.size())
    out.append(text.substr(at, found - at)).append(to);
  return out.append(text.substr(at));
}

Normalizer::Normalizer(const Json* section, const std::string& where) {
  if (section != nullptr && !section->is_null()) add(*section, where);
}

void Normalizer::add(const Json& section, const std::string& where) {
  const std::string& type = type_of(section, where + ", normalizer,");
  const auto text = [&](const Json& from, const char* name) {
    return from.at(name, where).text(where + ", normalizer,");
  };
  if (type == "NFC") {
    steps_.push_back({Kind::nfc, "", ""});
  } else if (type == "Prepend") {
    steps_.push_back({Kind::prepend, "", text(section, "prepend")});
  } else if (type == "Replace" && section.at("pattern", where).find("String") != nullptr) {
    steps_.push_back({Kind::replace, text(section.at("pattern", where), "String"), text(section, "content")});
  } else if (type == "Sequence") {
    for (const Json& each : section.at("normalizers", where).list(where + ", normalizers,")) add(each, where);
  } else {
    refuse(where, "has a normalizer of type " + type);
  }
}

std::string Normalizer::apply(std::string_view text) const {
  std::string out(text);
  for (const Step& step : steps_) {
    if (step.kind == Kind::nfc) {
      const std::vector<std::uint32_t> codes = nfc(code_points(out));
      out = to_utf8(codes, 0, codes.size());
    } else if (step.kind == Kind::replace) {
      out = replaced(out, step.from, step.to);
    } else if (!out.empty()) {
      out.insert(0, step.to);
    }
  }
  return out;
}

PreTokenizer::PreTokenizer(const Json* section, const std::string& where) {
  if (section == nullptr || section->is_null()) return;  // the whole text is one piece
  if (type_of(*section, where + ", pre_tokenizer,") != "Sequence") {
    add(*section, where, true);
    return;
  }
  const auto& all = section->at("pretokenizers", where).list(where + ", pretokenizers,");
  for (const Json& each : all) add(each, where, &each == &all.back());
}

void PreTokenizer::add(const Json& section, const std::string& where, bool last) {
  const std::string& type = type_of(section, where + ", pre_tokenizer,");
  if (type == "ByteLevel" && last) {
    byte_level_ = true;
    before_prefix_ = steps_.size();
    prefix_space_ = flag(section, "add_prefix_space", true, where);
    if (flag(section, "use_regex", true, where)) steps_.push_back({Regex(kGpt2), Keep::all});
  } else if (type == "Split") {
    add_split(section, where);
  } else if (type == "Digits") {
    steps_.push_back({Regex(flag(section, "individual_digits", false, where) ? R"(\p{N})" : R"(\p{N}+)"), Keep::all});
  } else {
    refuse(where, "has a pre-tokenizer of type " + type);
  }
}

void PreTokenizer::add_split(const Json& section, const std::string& where) {
  const std::string& behavior = section.at("behavior", where).text(where + ", behavior,");
  const bool invert = flag(section, "invert", false, where);
  Keep keep = Keep::all;
  if (behavior == "Removed")
    keep = invert ? Keep::matches : Keep::gaps;
  else if (behavior == "MergedWithPrevious" && !invert)
    keep = Keep::merged;
  else if (behavior != "Isolated")
    refuse(where, "splits with the behavior " + behavior);
  const Json& pattern = section.at("pattern", where);
  const Json* regex = pattern.find("Regex");
  if (regex != nullptr)
    steps_.push_back({Regex(regex->text(where + ", pattern,")), keep});
  else
    steps_.push_back({Regex::literal(pattern.at("String", where).text(where + ", pattern,")), keep});
}

std::vector<std::string> PreTokenizer::split(std::string_view text) const {
  std::vector<std::vector<std::uint32_t>> pieces{code_points(text)};
  for (std::size_t i = 0; i <= steps_.size(); ++i) {
    if (i == before_prefix_ && prefix_space_)
      for (auto& piece : pieces)
        if (piece.empty() || piece.front() != ' ') piece.insert(piece.begin(), ' ');
    if (i == steps_.size()) break;
    const Step& step = steps_[i];
    std::vector<std::vector<std::uint32_t>> result;
    for (const auto& piece : pieces) {
      const auto put = [&](std::size_t begin, std::size_t end, bool wanted) {
        if (wanted && begin < end)
          result.emplace_back(piece.begin() + static_cast<std::ptrdiff_t>(begin),
                              piece.begin() + static_cast<std::ptrdiff_t>(end));
      };
      std::size_t at = 0;
      for (const auto& [begin, end] : step.regex.matches(piece, 0, piece.size())) {
        if (step.keep == Keep::merged) {
          put(at, end, true);
        } else {
          put(at, begin, step.keep != Keep::matches);
          put(begin, end, step.keep != Keep::gaps);
        }
        at = end;
      }
      put(at, piece.size(), step.keep != Keep::matches);
    }
    pieces = std::move(result);
  }
  std::vector<std::string> out;
  out.reserve(pieces.size());
  for (const auto& piece : pieces) out.push_back(to_utf8(piece, 0, piece.size()));
  return out;
}

}  // namespace gptq_compile::detail
