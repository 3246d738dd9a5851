// SPDX-License-Identifier: Apache-2.0
#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string_view>

#include "json.h"

namespace gptq_compile::detail {

namespace {

constexpr std::uint64_t kMaxHeader = 100u << 20;
constexpr std::int64_t kMaxSize = std::int64_t{1} << 50;

struct Type {
  const char *in_file, *name;
  std::size_t bytes;
};
constexpr Type kTypes[] = {{"F32", "float32", 4}, {"F16", "float16", 2}, {"BF16", "bfloat16", 2},
                           {"I64", "int64", 8},   {"I32", "int32", 4},   {"U32", "uint32", 4},
                           {"I8", "int8", 1},     {"U8", "uint8", 1},    {"BOOL", "bool", 1}};

}  // namespace

std::size_t bytes_of(const std::string& dtype) {
  for (const Type& type : kTypes)
    if (dtype == type.name) return type.bytes;
  return 0;
}

MappedFile::MappedFile(const std::string& path) {
  const auto fail = [&path] { throw std::runtime_error(path + " cannot be read: " + std::strerror(errno) + "."); };
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail();
  struct stat info{};
  void* data = nullptr;
  if (::fstat(file, &info) == 0 && info.st_size > 0) {
    // Writable for the type of pointers that tensors have; nobody writes, and the file would not change if one did.
    data = ::mmap(nullptr, static_cast<std::size_t>(info.st_size), PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  }
  const int error = errno;
  ::close(file);
  errno = error;
  if (data == MAP_FAILED) fail();
  data_ = static_cast<unsigned char*>(data);
  size_ = static_cast<std::size_t>(info.st_size);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

Safetensors::Safetensors(const std::string& path) : file_(path) {
  if (file_.size() < 8) throw std::runtime_error(path + " is truncated: it is shorter than a safetensors header.");
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | file_.data()[i];
  if (length > kMaxHeader || length > file_.size() - 8)
    throw std::runtime_error(path + " is truncated or no safetensors file: its header would have " +
                             std::to_string(length) + " bytes.");
  const std::size_t start = 8 + static_cast<std::size_t>(length);
  const std::string_view header(reinterpret_cast<const char*>(file_.data()) + 8, static_cast<std::size_t>(length));
  const Json document = Json::parse(header, path + ", header,");
  for (const auto& [name, entry] : document.members(path + ", header,")) {
    if (name == "__metadata__") continue;
    const std::string where = path + ", tensor '" + name + "':";
    Tensor tensor;
    const std::string& type = entry.at("dtype", where).text(where + " dtype");
    const auto known =
        std::find_if(std::begin(kTypes), std::end(kTypes), [&](const Type& t) { return type == t.in_file; });
    if (known == std::end(kTypes))
      throw std::runtime_error(where + " dtype " + type + " is not one that artifacts have.");
    tensor.dtype = known->name;
    std::int64_t elements = 1;
    for (const Json& size : entry.at("shape", where).list(where + " shape")) {
      tensor.shape.push_back(size.integer(where + " shape", 0, kMaxSize));
      if (tensor.shape.back() != 0 && elements > kMaxSize / tensor.shape.back())
        throw std::runtime_error(where + " its shape is too large.");
      elements *= tensor.shape.back();
    }
    const auto& offsets = entry.at("data_offsets", where).list(where + " data_offsets");
    if (offsets.size() != 2) throw std::runtime_error(where + " data_offsets are not a pair.");
    const auto available = static_cast<std::int64_t>(file_.size() - start);
    const std::int64_t begin = offsets[0].integer(where + " data_offsets", 0, available);
    const std::int64_t end = offsets[1].integer(where + " data_offsets", begin, available);
    tensor.begin = start + static_cast<std::size_t>(begin);
    tensor.bytes = static_cast<std::size_t>(end - begin);
    if (tensor.bytes != static_cast<std::size_t>(elements) * known->bytes)
      throw std::runtime_error(where + " its data_offsets do not fit its shape and dtype.");
    tensors_.emplace(name, std::move(tensor));
  }
  check_layout(path, start);
}

void Safetensors::check_layout(const std::string& path, std::size_t start) const {
  // Tensors must tile the data exactly: no overlap, no hole, no trailing bytes (as the format's reference does).
  std::vector<std::pair<std::size_t, std::size_t>> spans;
  for (const auto& [name, tensor] : tensors_) spans.emplace_back(tensor.begin, tensor.begin + tensor.bytes);
  std::sort(spans.begin(), spans.end());
  std::size_t at = start;
  for (const auto& [begin, end] : spans) {
    if (begin != at)
      throw std::runtime_error(path + ": its tensors overlap or leave a hole at byte " + std::to_string(at) + ".");
    at = end;
  }
  if (at != file_.size()) throw std::runtime_error(path + ": there are bytes after the last tensor.");
}

}  // namespace gptq_compile::detail
