// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>

namespace gptq_compile::detail {

// The SHA-256 of a block of memory (FIPS 180-4, section 6.2), as 64 lower-case hexadecimal digits. With the
// processor's own instructions where it has them, unless `portable`.
std::string sha256(const unsigned char* data, std::size_t size, bool portable = false);

}  // namespace gptq_compile::detail
