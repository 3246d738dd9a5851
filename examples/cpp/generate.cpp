// SPDX-License-Identifier: Apache-2.0
// Continues a prompt with a model that gptq-compile compiled, and prints the text as it comes.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "gptq_compile.h"

namespace {

const char* const kUsage =
    "usage: generate ARTIFACT [PROMPT] [options]\n"
    "  PROMPT               text; standard input if left out\n"
    "  --ids 1,2,3          token ids instead of text; prints the new token ids\n"
    "  --raw                continue the prompt as it is, not as a message to a chat model\n"
    "  --system TEXT        system message of the chat\n"
    "  --max-new-tokens N   (default: 128)\n"
    "  --temperature F --top-k N --top-p F --min-p F   sample instead of taking the most likely token\n"
    "  --repetition-penalty F   --seed N   --stop TEXT   --ignore-eos\n"
    "  --device D           cpu, cuda or cuda:1   --cache-tokens N   --no-verify\n"
    "  --stats              tokens and speed on standard error\n";

struct Arguments {
  std::string artifact, prompt, system, ids;
  bool has_prompt = false, has_ids = false, raw = false, stats = false;
  gptq_compile::Options options;
  gptq_compile::Sampling sampling;
};

template <typename T>
T number(const std::string& name, const std::string& text) {
  std::istringstream in(text);
  T value{};
  if (!(in >> value) || !in.eof()) throw std::runtime_error(name + " takes a number, not '" + text + "'.");
  return value;
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments a;
  std::vector<std::string> plain;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const auto value = [&]() -> const std::string& {
      if (++i == words.size()) throw std::runtime_error(word + " needs a value.");
      return words[i];
    };
    auto& s = a.sampling;
    if (word == "--ids")
      a.ids = value(), a.has_ids = true;
    else if (word == "--raw")
      a.raw = true;
    else if (word == "--stats")
      a.stats = true;
    else if (word == "--system")
      a.system = value();
    else if (word == "--max-new-tokens")
      s.max_new_tokens = number<int>(word, value());
    else if (word == "--temperature")
      s.temperature = number<float>(word, value()), s.do_sample = s.temperature != 0;
    else if (word == "--top-k")
      s.top_k = number<int>(word, value()), s.do_sample = true;
    else if (word == "--top-p")
      s.top_p = number<float>(word, value()), s.do_sample = true;
    else if (word == "--min-p")
      s.min_p = number<float>(word, value()), s.do_sample = true;
    else if (word == "--repetition-penalty")
      s.repetition_penalty = number<float>(word, value());
    else if (word == "--seed")
      s.seed = number<std::uint32_t>(word, value());
    else if (word == "--stop")
      s.stop.push_back(value());
    else if (word == "--ignore-eos")
      s.eos_token_ids.emplace();
    else if (word == "--device")
      a.options.device = value();
    else if (word == "--cache-tokens")
      a.options.cache_tokens = number<std::int64_t>(word, value());
    else if (word == "--no-verify")
      a.options.verify = false;
    else if (word.size() > 1 && word[0] == '-')
      throw std::runtime_error("Unknown option " + word + ".");
    else
      plain.push_back(word);
  }
  if (plain.empty() || plain.size() > 2) throw std::runtime_error("Give the artifact's folder and one prompt.");
  a.artifact = plain[0];
  if (plain.size() == 2) a.prompt = plain[1], a.has_prompt = true;
  return a;
}

std::vector<std::int32_t> parse_ids(const std::string& text) {
  std::vector<std::int32_t> ids;
  std::istringstream in(text);
  for (std::string each; std::getline(in, each, ',');) ids.push_back(number<std::int32_t>("--ids", each));
  return ids;
}

void print(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

void run(Arguments a) {
  gptq_compile::Engine engine(a.artifact, a.options);
  gptq_compile::Result result;
  if (a.has_ids) {
    result = engine.generate(parse_ids(a.ids), a.sampling);
    for (std::size_t i = 0; i < result.token_ids.size(); ++i) std::printf(i == 0 ? "%d" : " %d", result.token_ids[i]);
  } else {
    if (!a.has_prompt) a.prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
    if (!a.raw && engine.has_chat_template()) {
      std::vector<std::pair<std::string, std::string>> messages;
      if (!a.system.empty()) messages.emplace_back("system", a.system);
      messages.emplace_back("user", a.prompt);
      a.prompt = engine.chat_prompt(messages);
    }
    result = engine.generate(a.prompt, a.sampling, [](std::string_view text) {
      print(text);
      return true;  // false would end the generation
    });
  }
  print("\n");
  if (!a.stats) return;
  const double steps = static_cast<double>(result.token_ids.size()) - 1;
  std::fprintf(stderr,
               "[%zu prompt tokens in %.3f s, %zu tokens at %.1f tokens/s on %s; graph of %zu nodes; ended by %s]\n",
               result.prompt_tokens, result.prefill_seconds, result.token_ids.size(),
               result.decode_seconds > 0 ? steps / result.decode_seconds : 0.0, engine.device().c_str(),
               engine.graph_nodes(), result.finish_reason.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(std::vector<std::string>(argv + 1, argv + argc)));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "generate: %s\n%s", error.what(), argc < 2 ? kUsage : "");
    return 2;
  }
}
