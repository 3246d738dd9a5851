// SPDX-License-Identifier: Apache-2.0
#include "processor.h"

#include <sys/utsname.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>

namespace gptq_compile::detail {

namespace {

using Words = std::vector<std::string>;

constexpr const char* kArm = "aarch64";
// What each level of x86-64 adds (System V ABI, AMD64 supplement, section 3.1.1), and what a compiler's name for a
// feature beyond it is, all in the words of /proc/cpuinfo: those that the kernel lets programs use.
const std::map<std::string, Words> kLevels = {
    {"x86-64-v2", {"sse4_2", "ssse3", "popcnt", "cx16"}},
    {"x86-64-v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}},
    {"x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}}};
const std::map<std::string, std::string> kFeatures = {
    {"avx512vnni", "avx512_vnni"}, {"avxvnni", "avx_vnni"}, {"dotprod", "asimddp"}};

std::string joined(const Words& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// What the processor has; nothing where the system does not say.
std::optional<std::set<std::string>> flags() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line))
    if (line.compare(0, 5, "flags") == 0 || line.compare(0, 8, "Features") == 0) {
      std::istringstream words(line.substr(line.find(':') + 1));
      return std::set<std::string>{std::istream_iterator<std::string>(words), std::istream_iterator<std::string>()};
    }
  return std::nullopt;
}

// What code for an architecture needs and the processor lacks; nothing if that is not known.
std::optional<Words> missing(const std::string& arch, const std::set<std::string>& has) {
  std::istringstream parts(arch);
  std::string name, feature;
  std::getline(parts, name, '+');
  Words needed;
  if (name == kArm) {
    needed.push_back("asimd");
  } else {
    if (kLevels.count(name) == 0) return std::nullopt;
    for (const auto& [level, needs] : kLevels)
      if (level <= name) needed.insert(needed.end(), needs.begin(), needs.end());
  }
  while (std::getline(parts, feature, '+')) {
    const auto known = kFeatures.find(feature);
    if (known == kFeatures.end()) return std::nullopt;
    needed.push_back(known->second);
  }
  Words lacking;
  std::copy_if(needed.begin(), needed.end(), std::back_inserter(lacking),
               [&](const std::string& flag) { return has.count(flag) == 0; });
  return lacking;
}

}  // namespace

std::string machine() {
  struct utsname names{};
  return ::uname(&names) == 0 ? names.machine : "unknown";
}

std::string choose_code(const std::vector<std::string>& archs, const std::string& wanted) {
  if (archs.empty()) throw std::runtime_error("The manifest names no processor that the artifact was compiled for. Compile it again.");
  if (!wanted.empty() && std::find(archs.begin(), archs.end(), wanted) == archs.end())
    throw std::runtime_error("This artifact has no code for " + wanted + ". It has code for " + joined(archs) + ".");
  const bool arm = archs.front().substr(0, archs.front().find('+')) == kArm;
  if (machine() != (arm ? kArm : "x86_64"))
    throw std::runtime_error(std::string("This artifact was compiled for ") + (arm ? kArm : "x86-64") +
                             ", and this machine is " + machine() + ". Compile it for that.");
  const auto has = flags();
  if (!has) return wanted.empty() ? archs.front() : wanted;
  if (wanted.empty())
    for (auto arch = archs.rbegin(); arch != archs.rend(); ++arch) {
      const auto lacking = missing(*arch, *has);
      if (lacking && lacking->empty()) return *arch;
    }
  const std::string& arch = wanted.empty() ? archs.front() : wanted;
  const auto lacking = missing(arch, *has);
  if (lacking && !lacking->empty())
    throw std::runtime_error("This artifact was compiled for " + arch + " processors, and this one lacks " +
                             joined(*lacking) + ". " +
                             (wanted.empty() ? std::string("Compile it with --target cpu:") + (arm ? kArm : "x86-64-v2")
                                             : "Use one of " + joined(archs)) +
                             ".");
  return arch;
}

}  // namespace gptq_compile::detail
