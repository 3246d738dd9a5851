// SPDX-License-Identifier: Apache-2.0
// A compiled model's folder: manifest.json (schema 1), the hashes of its files, its memory-mapped weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "json.h"
#include "safetensors.h"

namespace gptq_compile::detail {

struct CacheLayer {
  std::int64_t kv_heads, head_dim, v_head_dim;
};

struct WeightEntry {
  std::string name, dtype, file;
  std::vector<std::int64_t> shape;
};

constexpr std::int64_t kAnyNumber = std::numeric_limits<std::int64_t>::max();

struct Manifest {
  std::string name, target_kind, cache_dtype, library;
  std::vector<std::string> archs;
  std::int64_t vocab_size = 0, context_length = 0, page_size = 0;
  std::int64_t bos_token_id = -1;  // -1: there is none
  bool add_bos = false;
  std::vector<std::int32_t> eos_token_ids;
  std::vector<CacheLayer> cache_layers;
  std::map<std::int64_t, std::string> decode;  // batch size -> entry
  std::int64_t forward_tokens = kAnyNumber;    // of one call of `forward` at most
  std::string forward, sample, repetition_penalty, mark_seen, advance;
  std::vector<WeightEntry> weights;  // in the order of the weights tuple
  struct File {
    std::string sha256;
    std::int64_t size;
  };
  std::map<std::string, File> files;
  std::map<std::string, std::string> libraries;  // architecture -> file, where there are several
  Json document;  // the whole of it: "chat" and "generation" are read where they are needed

  std::int64_t cache_bytes_per_token() const;
  // Elements that a row of the cache takes: one of int8 has its float32 scale with it.
  std::int64_t cache_width(std::int64_t dim) const { return cache_dtype == "int8" ? dim + 4 : dim; }
};

// A validated artifact; nothing in it has been executed.
class Artifact {
 public:
  // Reads the manifest and checks every file it lists: sizes, and sha256 of all files (of large ones that had the right
  // one before, only if they were touched since: verified.h) or, without `verify`, of the shared libraries only, which
  // will be executed. Throws std::runtime_error naming the file or field that is wrong.
  Artifact(const std::string& folder, bool verify);

  const Manifest& manifest() const { return manifest_; }
  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  bool has(const std::string& name) const { return manifest_.files.count(name) != 0; }

  // One weight inside its mapped file, and the mapping that keeps it valid.
  const unsigned char* data(const WeightEntry& weight) const;
  std::shared_ptr<const void> mapping(const WeightEntry& weight) const;

 private:
  void check_files(bool verify) const;
  void check_weights();

  std::string folder_;
  Manifest manifest_;
  std::map<std::string, std::shared_ptr<Safetensors>> files_;
};

}  // namespace gptq_compile::detail
