// This machine, as far as it decides which engines run and how much memory there is. As runtime/engines/machine.py.
#pragma once

#include <optional>

#include "base.hpp"

namespace tw {

std::int64_t usable_cores();     // that this process may run on
std::string processor();         // the name of the CPU with its numbers
std::set<std::string> instructions();  // of the CPU, by the names in /proc/cpuinfo
std::optional<std::int64_t> available_bytes();  // free without swapping

}  // namespace tw
