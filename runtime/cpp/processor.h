// SPDX-License-Identifier: Apache-2.0
// Which of an artifact's libraries this processor can run; the same choice as the Python runtime's
// (runtime/processor.py).
#pragma once

#include <string>
#include <vector>

namespace gptq_compile::detail {

// The machine's name as uname has it: "x86_64", "aarch64".
std::string machine();

// Picks one of `archs`, which go from what every machine must have to what few have: the last that runs here, or
// `wanted` unless that is empty. What cannot be judged is taken if it is the first or the one wanted. Throws
// std::runtime_error if the processor lacks something, which would end in SIGILL.
std::string choose_code(const std::vector<std::string>& archs, const std::string& wanted);

}  // namespace gptq_compile::detail
