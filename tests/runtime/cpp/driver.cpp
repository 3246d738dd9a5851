// SPDX-License-Identifier: Apache-2.0
// Runs the C++ library's parts for the tests: one command a line on standard input, one line of answer each. Texts and
// bytes are in hexadecimal ("-" is the empty one), lists of numbers have commas. Failures answer "error: <sentence>".
#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "gptq_compile.h"
#include "json.h"
#include "regex.h"
#include "sha256.h"
#include "text.h"
#include "unicode.h"
#include "utf8.h"

namespace {

using gptq_compile::Engine;
using gptq_compile::Generation;
using gptq_compile::Result;
using gptq_compile::Sampling;
using gptq_compile::Tokenizer;
namespace detail = gptq_compile::detail;
using Ids = std::vector<std::int32_t>;

std::string unhex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; hex != "-" && i + 1 < hex.size(); i += 2)
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

std::string hex(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
    out += two;
  }
  return out.empty() ? "-" : out;
}

Ids numbers(const std::string& text) {
  Ids ids;
  std::istringstream in(text == "-" ? "" : text);
  for (std::string each; std::getline(in, each, ',');) ids.push_back(std::stoi(each));
  return ids;
}

template <typename T>
std::string joined(const std::vector<T>& values) {
  std::ostringstream out;
  out.precision(9);
  for (std::size_t i = 0; i < values.size(); ++i) out << (i == 0 ? "" : ",") << values[i];
  return values.empty() ? "-" : out.str();
}

Sampling sampling(std::istringstream& words) {
  Sampling s;
  for (std::string word; words >> word;) {
    const std::string key = word.substr(0, word.find('=')), value = word.substr(word.find('=') + 1);
    if (key == "max_new_tokens")
      s.max_new_tokens = std::stoi(value);
    else if (key == "do_sample")
      s.do_sample = value == "1";
    else if (key == "temperature")
      s.temperature = std::stof(value);
    else if (key == "top_k")
      s.top_k = std::stoi(value);
    else if (key == "top_p")
      s.top_p = std::stof(value);
    else if (key == "min_p")
      s.min_p = std::stof(value);
    else if (key == "repetition_penalty")
      s.repetition_penalty = std::stof(value);
    else if (key == "seed")
      s.seed = static_cast<std::uint32_t>(std::stoul(value));
    else if (key == "stop")
      s.stop.push_back(unhex(value));
    else if (key == "eos")
      s.eos_token_ids = numbers(value);
    else
      throw std::runtime_error("unknown setting " + key);
  }
  return s;
}

std::string described(const Result& r) { return joined(r.token_ids) + " " + r.finish_reason + " " + hex(r.text); }

class Driver {
 public:
  std::string answer(const std::string& line) {
    std::istringstream words(line);
    std::string command, a, b;
    words >> command;
    if (command == "tokenizer") {
      words >> a;
      tokenizer_ = std::make_unique<Tokenizer>(a);
      return "ok";
    }
    if (command == "encode") {
      words >> a;
      return joined(tokenizer_->encode(unhex(a)));
    }
    if (command == "decode") {
      words >> a >> b;
      return hex(tokenizer_->decode(numbers(b), a == "1"));
    }
    if (command == "pieces") {  // as a stream would show them
      words >> a;
      detail::IncrementalDecoder decoder(tokenizer_.get());
      std::string out;
      for (const std::int32_t id : numbers(a)) out += hex(decoder.push(id)) + ",";
      return out + hex(decoder.flush());
    }
    if (command == "nfc") {
      words >> a;
      const auto codes = detail::nfc(detail::code_points(unhex(a)));
      return hex(detail::to_utf8(codes, 0, codes.size()));
    }
    if (command == "match") {
      words >> a >> b;
      const auto codes = detail::code_points(unhex(b));
      std::string out;
      for (const auto& [begin, end] : detail::Regex(unhex(a)).matches(codes, 0, codes.size()))
        out += std::to_string(begin) + "-" + std::to_string(end) + ",";
      return out.empty() ? "-" : out;
    }
    if (command == "sha256") {
      words >> a >> b;
      const std::string bytes = unhex(a);
      return detail::sha256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), b == "1");
    }
    if (command == "json") {
      words >> a;
      return detail::Json::parse(unhex(a), "the text").kind_name();
    }
    return engine_answer(command, words);
  }

 private:
  std::string engine_answer(const std::string& command, std::istringstream& words) {
    std::string a, b;
    if (command == "load") {
      gptq_compile::Options options;
      words >> a >> options.cache_tokens >> options.verify >> b;
      options.device = unhex(b);
      engine_ = std::make_unique<Engine>(a, options);
      return engine_->name() + " " + std::to_string(engine_->vocab_size()) + " " +
             std::to_string(engine_->context_length());
    }
    if (command == "generate") {
      words >> a;
      return described(engine_->generate(numbers(a), sampling(words)));
    }
    if (command == "prompt") {
      words >> a;
      return described(engine_->generate(unhex(a), sampling(words)));
    }
    if (command == "cancel") {  // ends after the first piece of text
      words >> a;
      int calls = 0;
      const Result r = engine_->generate(numbers(a), sampling(words), [&](std::string_view) { return ++calls < 1; });
      return described(r) + " " + std::to_string(calls);
    }
    if (command == "turns") {  // two generations, token by token in turns
      words >> a >> b;
      const Sampling s = sampling(words);
      Generation first = engine_->start(numbers(a), s), second = engine_->start(numbers(b), s);
      while (!first.finished() || !second.finished()) {
        first.next();
        second.next();
      }
      return described(first.result()) + " " + described(second.result());
    }
    if (command == "logits") {
      words >> a;
      return joined(engine_->logits(numbers(a)));
    }
    if (command == "chat") {
      std::vector<std::pair<std::string, std::string>> messages;
      while (words >> a >> b) messages.emplace_back(a, unhex(b));
      return hex(engine_->chat_prompt(messages));
    }
    if (command == "encode_prompt") {
      words >> a;
      return joined(engine_->encode(unhex(a)));
    }
    if (command == "libraries") {  // what this process has mapped
      std::ifstream maps("/proc/self/maps");
      std::string names;
      for (std::string line; std::getline(maps, line);) {
        const std::size_t slash = line.rfind('/');
        if (slash != std::string::npos) names += line.substr(slash + 1) + ",";
      }
      return names;
    }
    throw std::runtime_error("unknown command " + command);
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace

int main() {
  Driver driver;
  for (std::string line; std::getline(std::cin, line);) {
    std::string answer;
    try {
      answer = driver.answer(line);
    } catch (const std::exception& error) {
      answer = std::string("error: ") + error.what();
    }
    std::cout << answer << std::endl;
  }
  return 0;
}
