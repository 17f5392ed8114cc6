#include "explained.hpp"

#include <algorithm>

namespace tw {

Error explained(const std::vector<Reason>& reasons, const Path& graph, const std::string& backend, const std::string& what, const std::string& message) {
    std::string lower = message;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](char c) { return static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c == '\n' ? ' ' : c); });
    const std::string told = graph.string() + ": " + backend + " " + what + " (" + one_line(message) + "); ";
    for (const auto& reason : reasons)
        for (const auto& word : reason.words)
            if (lower.find(word) != std::string::npos) return {reason.code, one_line(told + reason.advice, 800)};
    return {damaged, one_line(told + "verify the bundle with 'tilewright export verify'", 800)};
}

void require_own(const Path& graph, const Named<std::string>& types, const std::set<std::string>& results, const Named<Tensor>& inputs, const Strings& outputs) {
    auto refuse = [&](const std::string& what) { throw Error(damaged, graph.string() + ": " + what + "; " + OTHER_GRAPH); };
    for (const auto& [name, tensor] : inputs) {
        auto type = types.find(name);
        if (type == types.end()) refuse("has no input " + repr(name));
        if (tensor.dtype != type->second) refuse("input " + repr(name) + " is " + tensor.dtype + ", not " + type->second);
    }
    for (const auto& name : outputs)
        if (!results.count(name)) refuse("has no output " + repr(name));
    for (const auto& [name, type] : types)
        if (!inputs.count(name)) refuse("input " + repr(name) + " is missing");
}

}  // namespace tw
