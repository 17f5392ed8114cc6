// What a message of a backend means, and what to do. As runtime/engines/explained.py.
#pragma once

#include "bundle.hpp"
#include "tensor.hpp"

namespace tw {

// What to do, as several backends say it.
inline const char* const MEMORY = "use smaller tiles or low memory";
inline const char* const DAMAGED = "the graph is damaged: copy the bundle again, or rebuild the bundle";
inline const char* const OTHER_GRAPH = "the graph is not the one that bundle.json describes: rebuild the bundle";
inline const char* const OTHER_SIZE = "the graph does not take this size: use the bundle's own tile, or rebuild the bundle for this one";

// Words of messages, in small letters; the first reason that has one counts.
struct Reason {
    Strings words;
    Code code;
    std::string advice;
};

// `backend`: its name and version. `what`: it failed, or refuses the graph.
Error explained(const std::vector<Reason>& reasons, const Path& graph, const std::string& backend, const std::string& what, const std::string& message);

// Refuses inputs and outputs that are not the graph's, for backends that would compute something without a word. `types`: input -> type.
void require_own(const Path& graph, const Named<std::string>& types, const std::set<std::string>& results, const Named<Tensor>& inputs, const Strings& outputs);

}  // namespace tw
