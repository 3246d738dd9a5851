// SPDX-License-Identifier: Apache-2.0
#include "artifact.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <set>
#include <stdexcept>

#include "sha256.h"
#include "verified.h"

namespace gptq_compile::detail {

namespace {

namespace fs = std::filesystem;

// A JSON object with its name, so that every complaint names file and field.
struct Section {
  const Json& json;
  std::string where;

  Section child(const char* key) const {
    const Json& value = json.at(key, where);
    value.members(where + "." + key);
    return {value, where + "." + key};
  }
  std::string field(const char* key) const { return where + "." + key; }
  std::int64_t integer(const char* key, std::int64_t low, std::int64_t high) const {
    return json.at(key, where).integer(field(key), low, high);
  }
  const std::string& text(const char* key) const {
    const std::string& value = json.at(key, where).text(field(key));
    if (value.empty()) throw std::runtime_error(field(key) + " is empty.");
    return value;
  }
  const std::string& choice(const char* key, const std::vector<std::string>& choices) const {
    const std::string& value = text(key);
    if (std::find(choices.begin(), choices.end(), value) == choices.end())
      throw std::runtime_error(field(key) + " is '" + value + "', which this runtime does not know.");
    return value;
  }
};

constexpr std::int64_t kLarge = std::int64_t{1} << 50;

std::map<std::string, Manifest::File> read_files(const Section& top) {
  std::map<std::string, Manifest::File> files;
  const Section entries = top.child("files");
  for (const auto& [name, value] : entries.json.members(entries.where)) {
    const Section entry{value, entries.where + "['" + name + "']"};
    bool plain = !name.empty() && name.find_first_of(std::string("\\\0", 2)) == std::string::npos && name[0] != '/';
    for (const fs::path& part : fs::path(name)) plain = plain && !part.empty() && part != "." && part != "..";
    if (!plain) throw std::runtime_error(entry.where + " is not a plain path inside the artifact folder.");
    const std::string& digest = entry.text("sha256");
    if (digest.size() != 64 || digest.find_first_not_of("0123456789abcdef") != std::string::npos)
      throw std::runtime_error(entry.field("sha256") + " is not 64 lower-case hexadecimal digits.");
    files[name] = {digest, entry.integer("size", 0, kLarge)};
  }
  return files;
}

std::vector<WeightEntry> read_weights(const Section& top, const std::map<std::string, Manifest::File>& files) {
  std::vector<WeightEntry> weights;
  std::set<std::string> names;
  const std::string where = top.field("weights");
  for (const Json& value : top.json.at("weights", top.where).list(where)) {
    const Section entry{value, where + "[" + std::to_string(weights.size()) + "]"};
    WeightEntry weight;
    weight.name = entry.text("name");
    weight.dtype = entry.text("dtype");
    if (bytes_of(weight.dtype) == 0)
      throw std::runtime_error(entry.field("dtype") + " is not one that this runtime has.");
    const Json* file = value.find("file");
    weight.file = file == nullptr || file->is_null() ? "weights.safetensors" : file->text(entry.field("file"));
    if (files.count(weight.file) == 0) throw std::runtime_error(entry.field("file") + " is not in the list of files.");
    for (const Json& size : value.at("shape", entry.where).list(entry.field("shape")))
      weight.shape.push_back(size.integer(entry.field("shape"), 0, kLarge));
    if (!names.insert(weight.name).second) throw std::runtime_error(where + " lists '" + weight.name + "' twice.");
    weights.push_back(std::move(weight));
  }
  return weights;
}

void read_model(const Section& model, Manifest& manifest) {
  manifest.name = model.json.at("name", model.where).text(model.field("name"));
  manifest.vocab_size = model.integer("vocab_size", 1, std::int64_t{1} << 31);
  manifest.context_length = model.integer("context_length", 1, std::int64_t{1} << 31);
  const std::int64_t last = manifest.vocab_size - 1;
  const Json* bos = model.json.find("bos_token_id");
  if (bos != nullptr && !bos->is_null()) manifest.bos_token_id = bos->integer(model.field("bos_token_id"), 0, last);
  for (const Json& id : model.json.at("eos_token_ids", model.where).list(model.field("eos_token_ids")))
    manifest.eos_token_ids.push_back(static_cast<std::int32_t>(id.integer(model.field("eos_token_ids"), 0, last)));
  manifest.add_bos = model.json.at("add_bos", model.where).boolean(model.field("add_bos"));
  if (manifest.add_bos && manifest.bos_token_id < 0)
    throw std::runtime_error(model.field("add_bos") + " is true, but bos_token_id is null.");
}

void read_entries(const Section& entries, Manifest& manifest) {
  manifest.forward = entries.text("forward");
  const Json* tokens = entries.json.find("forward_tokens");
  if (tokens != nullptr && !tokens->is_null())
    manifest.forward_tokens = tokens->integer(entries.field("forward_tokens"), 1, kLarge);
  manifest.sample = entries.text("sample");
  manifest.repetition_penalty = entries.text("repetition_penalty");
  manifest.mark_seen = entries.text("mark_seen");
  manifest.advance = entries.text("advance");
  const Section decode = entries.child("decode");
  for (const auto& [size, name] : decode.json.members(decode.where)) {
    if (size.empty() || size.size() > 6 || size[0] == '0' || size.find_first_not_of("0123456789") != std::string::npos)
      throw std::runtime_error(decode.where + "." + size + " is not a batch size.");
    manifest.decode[std::stoll(size)] = name.text(decode.where + "." + size);
  }
  if (manifest.decode.empty()) throw std::runtime_error(decode.where + " is empty, so the artifact cannot generate.");
}

Manifest read_manifest(const std::string& folder) {
  const std::string path = folder + "/manifest.json";
  if (!fs::exists(path))
    throw std::runtime_error(path + " does not exist, so " + folder +
                             " is not a compiled model. Give the folder that gptq-compile wrote.");
  Manifest manifest;
  manifest.document = Json::read(path);
  const Section top{manifest.document, path + ": manifest"};
  if (top.text("format") != "gptq-compile") throw std::runtime_error(top.field("format") + " is not 'gptq-compile'.");
  const std::int64_t version = top.integer("schema_version", 0, kLarge);
  if (version != 1)
    throw std::runtime_error(
        path + " has schema version " + std::to_string(version) +
        ", and this runtime reads version 1. Compile the model with the version this code is from.");
  manifest.files = read_files(top);
  read_model(top.child("model"), manifest);
  const Section target = top.child("target");
  manifest.target_kind = target.choice("kind", {"cpu", "cuda"});
  for (const Json& arch : target.json.at("archs", target.where).list(target.field("archs")))
    manifest.archs.push_back(arch.text(target.field("archs")));
  const Section cache = top.child("kv_cache");
  manifest.page_size = cache.integer("page_size", 1, 1 << 16);
  manifest.cache_dtype = cache.choice("dtype", {"float32", "float16", "bfloat16", "int8"});
  for (const Json& layer : cache.json.at("layers", cache.where).list(cache.field("layers"))) {
    const Section one{layer, cache.field("layers")};
    manifest.cache_layers.push_back({one.integer("kv_heads", 1, 1 << 16), one.integer("head_dim", 1, 1 << 16),
                                     one.integer("v_head_dim", 1, 1 << 16)});
  }
  read_entries(top.child("entries"), manifest);
  manifest.library = top.text("library");
  if (manifest.files.count(manifest.library) == 0)
    throw std::runtime_error(top.field("library") + " is not in the list of files.");
  const Json* libraries = top.json.find("libraries");
  if (libraries != nullptr && !libraries->is_null())
    for (const Json& library : libraries->list(top.field("libraries"))) {
      const Section one{library, top.field("libraries")};
      const std::string& file = one.text("file");
      if (manifest.files.count(file) == 0) throw std::runtime_error(one.field("file") + " is not in the list of files.");
      manifest.libraries[one.text("arch")] = file;
    }
  manifest.weights = read_weights(top, manifest.files);
  return manifest;
}

// Whether a file is a shared library: model.so, lib/libcudart.so.13.
bool is_library(const std::string& name) {
  const std::string base = fs::path(name).filename().string();
  return base.find(".so.") != std::string::npos || (base.size() > 3 && base.compare(base.size() - 3, 3, ".so") == 0);
}

}  // namespace

std::int64_t Manifest::cache_bytes_per_token() const {
  std::int64_t values = 0;
  for (const CacheLayer& layer : cache_layers)
    values += layer.kv_heads * (cache_width(layer.head_dim) + cache_width(layer.v_head_dim));
  return values * static_cast<std::int64_t>(bytes_of(cache_dtype));
}

Artifact::Artifact(const std::string& folder, bool verify) : folder_(folder) {
  while (folder_.size() > 1 && folder_.back() == '/') folder_.pop_back();
  if (!fs::is_directory(folder_))
    throw std::runtime_error(folder_ + " is not a folder. Give the folder that gptq-compile wrote.");
  manifest_ = read_manifest(folder_);
  check_files(verify);
  check_weights();
}

void Artifact::check_files(bool verify) const {
  // The loader looks for dependencies in lib/, so what lies there unlisted could be executed unchecked.
  if (fs::is_directory(path("lib")))
    for (const auto& entry : fs::directory_iterator(path("lib")))
      if (!has("lib/" + entry.path().filename().string()))
        throw std::runtime_error(entry.path().string() + " is not in the manifest's list of files. Remove it.");
  const std::string root = fs::canonical(folder_).string() + "/";
  for (const auto& [name, file] : manifest_.files) {
    const std::string full = path(name);
    if (!fs::is_regular_file(full))
      throw std::runtime_error(full + " is missing, although the manifest lists it. Copy the artifact again.");
    if (fs::canonical(full).string().compare(0, root.size(), root) != 0)
      throw std::runtime_error(full + " leads out of the artifact folder. Replace the link by the file itself.");
    const auto size = static_cast<std::int64_t>(fs::file_size(full));
    if (size != file.size)
      throw std::runtime_error(full + " has " + std::to_string(size) + " bytes and should have " +
                               std::to_string(file.size) +
                               ": it is truncated or was replaced. Copy the artifact again.");
  }
  for (const auto& [name, file] : manifest_.files) {
    const bool library = is_library(name), small = library || file.size < kSmallestNoted;
    if (!verify && !library) continue;
    if (!small && is_known(path(name), file.sha256)) continue;
    const std::string before = file_state(path(name));
    const MappedFile content(path(name));
    if (sha256(content.data(), content.size()) != file.sha256)
      throw std::runtime_error(path(name) +
                               " is not the file that was compiled: its sha256 differs. Copy the artifact " +
                               "again; nothing of it was executed.");
    if (!small) remember(path(name), file.sha256, before);
  }
}

void Artifact::check_weights() {
  for (const WeightEntry& weight : manifest_.weights) {
    auto& file = files_[weight.file];
    if (file == nullptr) file = std::make_shared<Safetensors>(path(weight.file));
    const auto found = file->tensors().find(weight.name);
    const std::string where = path(weight.file) + ", tensor '" + weight.name + "':";
    if (found == file->tensors().end())
      throw std::runtime_error(where + " the manifest lists it, but the file does not have it.");
    if (found->second.shape != weight.shape || found->second.dtype != weight.dtype)
      throw std::runtime_error(where + " its shape or dtype is not what the manifest says.");
  }
}

const unsigned char* Artifact::data(const WeightEntry& weight) const {
  const auto& file = files_.at(weight.file);
  return file->data(file->tensors().at(weight.name));
}

std::shared_ptr<const void> Artifact::mapping(const WeightEntry& weight) const { return files_.at(weight.file); }

}  // namespace gptq_compile::detail
