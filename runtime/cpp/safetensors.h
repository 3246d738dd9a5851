// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace gptq_compile::detail {

// A file mapped copy-on-write into memory.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  unsigned char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  unsigned char* data_ = nullptr;
  std::size_t size_ = 0;
};

// A safetensors file: 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}}, data. Everything
// is validated before the first tensor is touched.
class Safetensors {
 public:
  struct Tensor {
    std::string dtype;  // as the manifest calls it: "float16", "bfloat16", ...
    std::vector<std::int64_t> shape;
    std::size_t begin = 0, bytes = 0;  // from the start of the file
  };

  explicit Safetensors(const std::string& path);
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  unsigned char* data(const Tensor& tensor) const { return file_.data() + tensor.begin; }

 private:
  void check_layout(const std::string& path, std::size_t start) const;

  MappedFile file_;
  std::map<std::string, Tensor> tensors_;
};

// Bytes of one element; 0 for a type that artifacts do not have.
std::size_t bytes_of(const std::string& dtype);

}  // namespace gptq_compile::detail
