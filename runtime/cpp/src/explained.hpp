// What a message of a backend means, and what to do. As runtime/engines/explained.py.
#pragma once

#include "bundle.hpp"

namespace tw {

// Words of messages, in small letters; the first reason that has one counts.
struct Reason {
    Strings words;
    Code code;
    const char* advice;
};

// `backend`: its name and version. `what`: it failed, or refuses the graph.
Error explained(const std::vector<Reason>& reasons, const Path& graph, const std::string& backend, const std::string& what, const std::string& message);

}  // namespace tw
