// SPDX-License-Identifier: Apache-2.0
// Remembers which large files had the right hash; the same notes as the Python runtime's (runtime/verified.py).
#pragma once

#include <cstdint>
#include <string>

namespace gptq_compile::detail {

// Bytes; what is smaller is hashed in milliseconds.
constexpr std::int64_t kSmallestNoted = 8 << 20;

// Size and times of a file as they are now, to be compared later; empty if it cannot be asked.
std::string file_state(const std::string& path);

// Whether the file has been found to have this hash and was not touched since.
bool is_known(const std::string& path, const std::string& sha256);

// Notes that the file has this hash. `before` is its state when the hashing began. Failures are ignored, since nothing
// depends on it.
void remember(const std::string& path, const std::string& sha256, const std::string& before);

}  // namespace gptq_compile::detail
