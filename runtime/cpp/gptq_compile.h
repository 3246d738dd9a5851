// SPDX-License-Identifier: Apache-2.0
// Runs a model that gptq-compile compiled: no Python, and nothing to link but this library. TVM's runtime is opened out
// of the artifact's lib/ folder when an engine is made. Every error is a std::runtime_error whose text is a sentence.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gptq_compile {

// A tokenizer.json with byte-pair encoding, over bytes (GPT-2, SmolLM2, Llama 3, Qwen, ...) or over characters with
// bytes to fall back on (Llama 2, Mistral, Gemma); others are refused with the reason.
class Tokenizer {
 public:
  explicit Tokenizer(const std::string& path);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  // Text (UTF-8) to tokens; nothing is put in front or behind. Bytes that are not UTF-8 count as U+FFFD.
  std::vector<std::int32_t> encode(std::string_view text) const;
  // Tokens to text. Bytes that make no character come out as U+FFFD; unknown tokens as nothing.
  std::string decode(const std::vector<std::int32_t>& ids, bool skip_special_tokens = true) const;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

struct Options {
  std::string device;             // "cpu", "cuda" or "cuda:1"; by default what the artifact was compiled for
  std::int64_t cache_tokens = 0;  // tokens that the KV cache holds; 0: one context, if that takes at most 1 GiB (CPU)
                                  // or 60 % of the GPU's free memory
  bool verify = true;             // check the sha256 of every file, of large ones only if they were touched since they
                                  // were last found right; the shared libraries are checked in any case
};

// How tokens are chosen and when generation ends.
struct Sampling {
  int max_new_tokens = 128;         // most tokens to generate; the context may end it earlier
  bool do_sample = false;           // draw from the distribution; otherwise take the most likely token
  float temperature = 1.0f;         // divides the logits
  int top_k = 0;                    // sample from the k most likely tokens; 0 is all
  float top_p = 1.0f;               // sample from the most likely tokens that together reach this probability
  float min_p = 0.0f;               // drop tokens less likely than this times the most likely one
  float repetition_penalty = 1.0f;  // makes tokens of the prompt and the output less likely; 1 is off
  std::uint32_t seed = 0;           // same seed, same tokens
  std::vector<std::string> stop;    // strings that end the text; they are left out of it
  std::optional<std::vector<std::int32_t>> eos_token_ids;  // end tokens instead of the model's; empty never ends early
};

struct Result {
  std::string text;                     // without special tokens and without the stop string
  std::vector<std::int32_t> token_ids;  // the generated tokens, the end token included
  std::string finish_reason;            // "eos", "stop" (a stop string), "length", or "cancelled"
  std::size_t prompt_tokens = 0;
  double prefill_seconds = 0;  // from the start to the first token
  double decode_seconds = 0;   // from the first token to the last
};

// One prompt being continued. It holds pages of its engine's KV cache until it ends or is destroyed.
class Generation {
 public:
  ~Generation();
  Generation(Generation&&) noexcept;
  Generation& operator=(Generation&&) noexcept;

  // Computes the next token; empty when it has ended. The first call runs the prompt.
  std::optional<std::int32_t> next();
  // Text that has become certain since the last call: never half a character, never the beginning of a stop string.
  std::string take_text();
  void cancel();
  bool finished() const;
  Result result() const;  // so far

 private:
  friend class Engine;
  struct Impl;
  explicit Generation(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// A loaded artifact. Use it, and the generations that it starts, from one thread at a time.
class Engine {
 public:
  explicit Engine(const std::string& folder, const Options& options = {});
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  std::string name() const;    // of the model
  std::string device() const;  // in words
  std::int64_t vocab_size() const;
  std::int64_t context_length() const;  // tokens that one sequence can hold, the new ones included
  bool has_chat_template() const;
  // CUDA: launches that one decode step replays as a graph; 0 before the third step, on the CPU, and where the driver
  // refused to record it.
  std::size_t graph_nodes() const;

  // Throws if the artifact has no tokenizer, or one that this code does not read.
  const Tokenizer& tokenizer() const;
  // Tokens of a prompt; the beginning-of-sequence token is put first where the model wants it, once.
  std::vector<std::int32_t> encode(std::string_view text) const;
  // Messages as (role, content) in the model's chat template, ending with the beginning of the answer.
  std::string chat_prompt(const std::vector<std::pair<std::string, std::string>>& messages) const;

  // Continues a prompt, token by token. Several generations may run in turns if the KV cache has room.
  Generation start(const std::vector<std::int32_t>& ids, const Sampling& sampling = {});
  // Continues a prompt to its end. `on_text` is given text as it comes; if it returns false, generation ends.
  using OnText = std::function<bool(std::string_view)>;
  Result generate(const std::vector<std::int32_t>& ids, const Sampling& sampling = {}, const OnText& on_text = {});
  Result generate(std::string_view prompt, const Sampling& sampling = {}, const OnText& on_text = {});

  // Logits of every position, float32 [tokens, vocab_size] row by row: row i is the prediction after ids[i].
  std::vector<float> logits(const std::vector<std::int32_t>& ids);

 private:
  friend class Generation;
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace gptq_compile
