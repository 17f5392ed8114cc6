// Errors, and values written as Python writes them: both runtimes refuse with the same words.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace tw {

// The codes of tilewright.h.
enum Code { internal = 1, usage = 2, damaged = 3, environment = 4, resource = 5, accuracy = 7, input = 8, device = 9, cancelled = 130 };

struct Error : std::runtime_error {
    Code code;
    Error(Code code, const std::string& message) : std::runtime_error(message), code(code) {}
};

// A value outside its limits. The reader that knows its place adds the place.
struct Invalid : std::runtime_error {
    using std::runtime_error::runtime_error;
};

using Strings = std::vector<std::string>;
using Shape = std::vector<std::int64_t>;

std::string repr(const std::string& text);
std::string repr(double number);
std::string repr(const Shape& shape);
std::string repr(const std::map<std::string, std::string>& pairs);
std::string general(double number);  // as printf's %g
std::string join(const Strings& parts, const std::string& between = ", ");
// A complaint as one printable line; the middle of a long one is cut out.
std::string one_line(const std::string& complaint, std::size_t longest = 400);
bool printable(const std::string& text);
bool is_identifier(const std::string& name);  // of ASCII

template <class Map>
Strings keys(const Map& map) {
    Strings names;
    for (const auto& entry : map) names.push_back(entry.first);
    return names;
}

template <class Map>
std::set<std::string> key_set(const Map& map) {
    std::set<std::string> names;
    for (const auto& entry : map) names.insert(entry.first);
    return names;
}

inline Strings listed(const std::set<std::string>& names) { return {names.begin(), names.end()}; }

}  // namespace tw
