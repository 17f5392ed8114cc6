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

}  // namespace tw
