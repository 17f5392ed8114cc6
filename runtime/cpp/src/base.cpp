#include "base.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>

namespace tw {
namespace {

struct Letter {
    char32_t code;
    std::size_t size;
};

// The code point at a place of UTF-8. A byte that begins none counts as itself.
Letter letter(const std::string& text, std::size_t at) {
    auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    unsigned char first = byte(at);
    std::size_t size = first < 0x80 ? 1 : first >> 5 == 6 ? 2 : first >> 4 == 14 ? 3 : first >> 3 == 30 ? 4 : 1;
    if (size == 1 || at + size > text.size()) return {first, 1};
    char32_t code = first & (0x7F >> size);
    for (std::size_t i = 1; i < size; ++i) code = code << 6 | (byte(at + i) & 0x3F);
    return {code, size};
}

// Controls, separators, marks without ink, and private codes: str.isprintable of Python, for the letters in use.
bool shows(char32_t c) {
    if (c < 0x7F) return c >= 0x20;
    if (c <= 0xA0 || c == 0xAD || c == 0x1680 || c == 0x3000 || c == 0xFEFF) return false;
    if (c >= 0x2000 && c <= 0x200F) return false;
    if (c >= 0x2028 && c <= 0x202F) return false;
    if (c >= 0x205F && c <= 0x206F) return false;
    return !(c >= 0xD800 && c <= 0xF8FF);
}

std::string escaped(char32_t c) {
    char text[16];
    if (c == '\n') return "\\n";
    if (c == '\r') return "\\r";
    if (c == '\t') return "\\t";
    const char* form = c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x";
    std::snprintf(text, sizeof text, form, static_cast<unsigned>(c));
    return text;
}

}  // namespace

std::string repr(const std::string& text) {
    char quote = text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
    std::string out(1, quote);
    for (std::size_t at = 0; at < text.size();) {
        auto [code, size] = letter(text, at);
        if (code == static_cast<char32_t>(quote) || code == '\\') {
            out += '\\';
            out += text[at];
        } else {
            out += shows(code) ? text.substr(at, size) : escaped(code);
        }
        at += size;
    }
    return out + quote;
}

std::string repr(double number) {
    if (std::isnan(number)) return "nan";
    if (std::isinf(number)) return number > 0 ? "inf" : "-inf";
    char text[64];
    auto end = std::to_chars(text, text + sizeof text, number, std::chars_format::scientific).ptr;
    std::string shortest(text, end);
    int exponent = std::stoi(shortest.substr(shortest.find('e') + 1));
    if (exponent < -4 || exponent >= 16) return shortest;
    end = std::to_chars(text, text + sizeof text, number, std::chars_format::fixed).ptr;
    std::string plain(text, end);
    return plain.find('.') == std::string::npos ? plain + ".0" : plain;
}

std::string repr(const Shape& shape) {
    Strings parts;
    for (auto size : shape) parts.push_back(std::to_string(size));
    return "[" + join(parts) + "]";
}

std::string repr(const std::map<std::string, std::string>& pairs) {
    Strings parts;
    for (const auto& [key, value] : pairs) parts.push_back(repr(key) + ": " + repr(value));
    return "{" + join(parts) + "}";
}

std::string general(double number) {
    char text[64];
    std::snprintf(text, sizeof text, "%g", number);
    return text;
}

std::string join(const Strings& parts, const std::string& between) {
    std::string out;
    for (std::size_t i = 0; i < parts.size(); ++i) out += (i ? between : "") + parts[i];
    return out;
}

std::string one_line(const std::string& complaint, std::size_t longest) {
    Strings letters;
    for (std::size_t at = 0; at < complaint.size();) {
        auto [code, size] = letter(complaint, at);
        if (shows(code)) {
            letters.push_back(complaint.substr(at, size));
        } else {
            for (char c : escaped(code)) letters.emplace_back(1, c);
        }
        at += size;
    }
    if (letters.size() <= longest) return join(letters, "");
    auto half = static_cast<std::ptrdiff_t>(longest / 2);
    return join({letters.begin(), letters.begin() + half - 5}, "") + " ... " + join({letters.end() - half, letters.end()}, "");
}

bool printable(const std::string& text) {
    for (std::size_t at = 0; at < text.size();) {
        auto [code, size] = letter(text, at);
        if (!shows(code)) return false;
        at += size;
    }
    return true;
}

bool is_identifier(const std::string& name) {
    auto alpha = [](char c) { return (c | 32) >= 'a' && (c | 32) <= 'z'; };
    if (name.empty() || (name[0] >= '0' && name[0] <= '9')) return false;
    for (char c : name)
        if (!alpha(c) && !(c >= '0' && c <= '9') && c != '_') return false;
    return true;
}

}  // namespace tw
