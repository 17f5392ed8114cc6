// Which machine code in bundles may run by itself. As runtime/engines/trust.py.
#pragma once

#include "documents.hpp"

namespace tw {

// Component -> its engines whose machine code was compiled elsewhere.
Named<std::set<std::string>> strangers(const Manifest& manifest);

}  // namespace tw
