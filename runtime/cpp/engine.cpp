// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <stdexcept>

#include "engine_impl.h"

namespace gptq_compile {

using detail::Json;
using detail::Manifest;
using detail::PagedCache;

Engine::Impl::Impl(const std::string& folder, const Options& options) : artifact(folder, options.verify) {
  const Manifest& manifest = artifact.manifest();
  if (options.cache_tokens < 0)
    throw std::runtime_error("cache_tokens is negative; it must be 1 or more, or 0 for the default.");
  const auto open = detail::find_device(options.device, manifest);
  const bool cuda = manifest.target_kind == "cuda";
  // libtvm_ffi.so too: in Python it comes from a package, here from the artifact.
  for (const char* name : {"lib/libtvm_ffi.so", "lib/libtvm_runtime.so", "lib/libtvm_runtime_cuda.so"})
    if (!artifact.has(name) && (cuda || std::string(name).find("cuda") == std::string::npos))
      throw std::runtime_error(artifact.path("manifest.json") + ": " + name +
                               " is not in the list of files, so it cannot be trusted. Compile the model again.");
  detail::Tvm::load(artifact.path("lib"), cuda);
  device = open();
  const detail::StreamScope stream(*device);
  model = std::make_unique<detail::Model>(artifact, *device);
  std::int64_t tokens = options.cache_tokens;
  if (tokens == 0) {
    const auto affordable =
        static_cast<std::int64_t>(device->cache_budget()) / std::max<std::int64_t>(manifest.cache_bytes_per_token(), 1);
    tokens = std::min(manifest.context_length, std::max(affordable, manifest.page_size));
  }
  cache = std::make_unique<PagedCache>(manifest, *device, tokens);
  step = std::make_unique<detail::DecodeStep>(*device, *model, *cache, manifest.vocab_size);
  device->synchronize();
  if (!artifact.has("tokenizer.json")) {
    no_tokenizer = "This artifact has no tokenizer. Give the prompt as a list of token ids.";
    return;
  }
  try {
    tokenizer = std::make_unique<Tokenizer>(artifact.path("tokenizer.json"));
  } catch (const std::runtime_error& error) {
    no_tokenizer = error.what();  // token ids still work
  }
}

Engine::Impl::~Impl() {
  try {
    device->synchronize();           // nothing may be in flight when graphs and buffers go
  } catch (const std::exception&) {  // a device that failed has said so before
  }
}

void Engine::Impl::check_ids(const std::vector<std::int32_t>& ids) const {
  if (ids.empty()) throw std::runtime_error("The prompt has no tokens. Give at least one.");
  for (const std::int32_t id : ids)
    if (id < 0 || id >= artifact.manifest().vocab_size)
      throw std::runtime_error("Token " + std::to_string(id) + " is outside the model's vocabulary of " +
                               std::to_string(artifact.manifest().vocab_size) + ".");
}

std::int64_t Engine::Impl::prefill_tokens() const {
  return std::min(device->prefill_tokens(), artifact.manifest().forward_tokens);
}

detail::Value Engine::Impl::prefill(const std::vector<std::int32_t>& ids, const std::vector<std::int32_t>& page_row) {
  detail::Value logits;
  const auto size = static_cast<std::int64_t>(ids.size());
  for (std::int64_t begin = 0; begin < size; begin += prefill_tokens())
    logits = detail::run_forward(*device, *model, *cache, ids.data() + begin,
                                 std::min(prefill_tokens(), size - begin), begin, page_row, false);
  return logits;
}

void Engine::Impl::take_over(Generation::Impl* generation) {
  if (owner == generation) return;
  while (owner != nullptr && step->in_flight() > 0) owner->pending.push_back(step->collect());
  owner = generation;
  step->load(generation->tokens, generation->page_row, generation->sampling);
}

Engine::Engine(const std::string& folder, const Options& options) : impl_(std::make_shared<Impl>(folder, options)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

std::string Engine::name() const { return impl_->artifact.manifest().name; }
std::string Engine::device() const { return impl_->device->description(); }
std::int64_t Engine::vocab_size() const { return impl_->artifact.manifest().vocab_size; }
std::int64_t Engine::context_length() const { return impl_->cache->max_sequence(); }
std::size_t Engine::graph_nodes() const { return impl_->step->graph_nodes(); }

bool Engine::has_chat_template() const {
  const Json* chat = impl_->artifact.manifest().document.find("chat");
  return chat != nullptr && !chat->is_null();
}

const Tokenizer& Engine::tokenizer() const {
  if (impl_->tokenizer == nullptr) throw std::runtime_error(impl_->no_tokenizer);
  return *impl_->tokenizer;
}

std::vector<std::int32_t> Engine::encode(std::string_view text) const {
  const Manifest& manifest = impl_->artifact.manifest();
  std::vector<std::int32_t> ids = tokenizer().encode(text);
  const auto bos = static_cast<std::int32_t>(manifest.bos_token_id);
  if (manifest.add_bos && (ids.empty() || ids.front() != bos)) ids.insert(ids.begin(), bos);
  return ids;
}

std::string Engine::chat_prompt(const std::vector<std::pair<std::string, std::string>>& messages) const {
  if (!has_chat_template()) throw std::runtime_error("This model has no chat template. Give a plain prompt.");
  if (messages.empty()) throw std::runtime_error("A chat needs at least one message.");
  const std::string where = impl_->artifact.path("manifest.json") + ": chat";
  const Json& chat = *impl_->artifact.manifest().document.find("chat");
  const Json& roles = chat.at("roles", where);
  std::string prompt = chat.at("bos", where).text(where + ".bos");
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const auto& [role, content] = messages[i];
    const Json* segment = roles.find(role);
    if (segment == nullptr)
      throw std::runtime_error("Message " + std::to_string(i + 1) + " has the role '" + role +
                               "', which this model's chat template does not know.");
    const Json* system = chat.find("default_system");
    if (i == 0 && role != "system" && system != nullptr && !system->is_null())
      prompt += system->text(where + ".default_system");
    prompt += segment->at("prefix", where).text(where + ".prefix") + content;
    prompt += segment->at("suffix", where).text(where + ".suffix");
  }
  return prompt + chat.at("generation_prompt", where).text(where + ".generation_prompt");
}

Generation Engine::start(const std::vector<std::int32_t>& ids, const Sampling& sampling) {
  return Generation(std::make_unique<Generation::Impl>(impl_, ids, sampling));
}

Result Engine::generate(const std::vector<std::int32_t>& ids, const Sampling& sampling, const OnText& on_text) {
  Generation generation = start(ids, sampling);
  while (generation.next()) {
    const std::string text = generation.take_text();
    if (on_text && !text.empty() && !on_text(text)) generation.cancel();
  }
  const std::string rest = generation.take_text();
  if (on_text && !rest.empty()) on_text(rest);
  return generation.result();
}

Result Engine::generate(std::string_view prompt, const Sampling& sampling, const OnText& on_text) {
  return generate(encode(prompt), sampling, on_text);
}

std::vector<float> Engine::logits(const std::vector<std::int32_t>& ids) {
  impl_->check_ids(ids);
  const auto count = static_cast<std::int64_t>(ids.size());
  const auto vocab = static_cast<std::size_t>(vocab_size());
  if (count > context_length())
    throw std::runtime_error("The text has " + std::to_string(count) + " tokens, and a sequence holds " +
                             std::to_string(context_length()) + ". Give shorter pieces.");
  std::vector<float> result(ids.size() * vocab);
  const detail::StreamScope stream(*impl_->device);
  const std::vector<std::int32_t> row = impl_->cache->allocate(count);
  try {
    for (std::int64_t begin = 0; begin < count; begin += impl_->prefill_tokens()) {
      const std::int64_t size = std::min(impl_->prefill_tokens(), count - begin);
      const detail::Value logits =
          detail::run_forward(*impl_->device, *impl_->model, *impl_->cache, ids.data() + begin, size, begin, row, true);
      if (logits.tensor_bytes() != static_cast<std::size_t>(size) * vocab * sizeof(float))
        throw std::runtime_error(
            "The artifact's entry 'forward' returned logits of another size. Compile the model again.");
      impl_->device->download(result.data() + static_cast<std::size_t>(begin) * vocab, logits);
    }
  } catch (...) {
    impl_->cache->release(row);
    throw;
  }
  impl_->cache->release(row);
  return result;
}

}  // namespace gptq_compile
