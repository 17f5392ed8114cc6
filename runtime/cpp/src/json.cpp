#include "json.hpp"

#include <charconv>
#include <cstdio>
#include <limits>
#include <set>

#include "base.hpp"

namespace tw {
namespace {

constexpr int DEEPEST = 200;

class Parser {
   public:
    Parser(const std::string& text, const std::string& where) : text_(text), where_(where) {}

    Json document() {
        Json value = any(0);
        blank();
        if (at_ != text_.size()) fail("text after the end");
        return value;
    }

   private:
    const std::string& text_;
    const std::string& where_;
    std::size_t at_ = 0;

    [[noreturn]] void fail(const std::string& reason) const {
        throw Error(damaged, where_ + ": not valid JSON (" + reason + " at byte " + std::to_string(at_) + "); rebuild the bundle");
    }
    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    void blank() {
        while (at_ < text_.size() && (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t')) ++at_;
    }
    bool take(const char* word) {
        std::string expected(word);
        if (text_.compare(at_, expected.size(), expected) != 0) return false;
        at_ += expected.size();
        return true;
    }
    void need(char c) {
        if (peek() != c || at_ >= text_.size()) fail(std::string("expected ") + c);
        ++at_;
    }

    Json any(int depth) {
        if (depth > DEEPEST) fail("nested too deeply");
        blank();
        Json value;
        if (peek() == '{') return object(depth);
        if (peek() == '[') return list(depth);
        if (peek() == '"') {
            value.kind = Json::string;
            value.text = string();
            return value;
        }
        if (take("null")) return value;
        value.kind = Json::boolean;
        if (take("false")) return value;
        value.truth = true;
        if (take("true")) return value;
        return number();
    }

    Json object(int depth) {
        Json value;
        value.kind = Json::object;
        std::set<std::string> names;
        need('{');
        blank();
        if (peek() == '}') return ++at_, value;
        while (true) {
            blank();
            if (peek() != '"') fail("expected a key");
            std::string key = string();
            blank();
            need(':');
            Json member = any(depth + 1);
            if (!names.insert(key).second)
                throw Error(damaged, one_line(where_ + ": key " + repr(key) + " appears twice in one object; rebuild the bundle"));
            value.members.push_back({std::move(key), std::move(member)});
            blank();
            if (peek() == '}') return ++at_, value;
            need(',');
        }
    }

    Json list(int depth) {
        Json value;
        value.kind = Json::list;
        need('[');
        blank();
        if (peek() == ']') return ++at_, value;
        while (true) {
            value.items.push_back(any(depth + 1));
            blank();
            if (peek() == ']') return ++at_, value;
            need(',');
        }
    }

    Json number() {
        auto digits = [&] {
            std::size_t from = at_;
            while (peek() >= '0' && peek() <= '9') ++at_;
            if (at_ == from) fail("expected a value");
        };
        std::size_t from = at_;
        Json value;
        value.kind = Json::integer;
        if (peek() == '-') ++at_;
        if (peek() == '0') {
            ++at_;
        } else {
            digits();
        }
        if (peek() == '.') {
            value.kind = Json::number;
            ++at_;
            digits();
        }
        if (peek() == 'e' || peek() == 'E') {
            value.kind = Json::number;
            ++at_;
            if (peek() == '+' || peek() == '-') ++at_;
            digits();
        }
        value.text = text_.substr(from, at_ - from);
        const char *begin = value.text.data(), *end = begin + value.text.size();
        if (value.kind == Json::integer) value.huge = std::from_chars(begin, end, value.whole).ec != std::errc();
        if (std::from_chars(begin, end, value.real).ec == std::errc::result_out_of_range) {
            bool tiny = value.kind == Json::number && value.text.find('-', 1) != std::string::npos;
            value.real = tiny ? 0.0 : std::numeric_limits<double>::infinity();
        }
        return value;
    }

    unsigned hex() {
        unsigned code = 0;
        if (at_ + 4 > text_.size()) fail("a cut \\u");
        auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + at_ + 4, code, 16);
        if (error != std::errc() || end != text_.data() + at_ + 4) fail("a wrong \\u");
        at_ += 4;
        return code;
    }

    static void put(std::string& out, unsigned c) {
        auto byte = [&](unsigned b) { out += static_cast<char>(b); };
        if (c < 0x80) return byte(c);
        if (c < 0x800) return byte(0xC0 | c >> 6), byte(0x80 | (c & 0x3F));
        if (c < 0x10000) return byte(0xE0 | c >> 12), byte(0x80 | (c >> 6 & 0x3F)), byte(0x80 | (c & 0x3F));
        byte(0xF0 | c >> 18), byte(0x80 | (c >> 12 & 0x3F)), byte(0x80 | (c >> 6 & 0x3F)), byte(0x80 | (c & 0x3F));
    }

    // One letter of valid UTF-8: no overlong form, no half of a pair, nothing above 10FFFF.
    void letter(std::string& out) {
        auto first = static_cast<unsigned char>(peek());
        int more = first < 0x80 ? 0 : first >= 0xC2 && first < 0xE0 ? 1 : first >> 4 == 14 ? 2 : first >= 0xF0 && first < 0xF5 ? 3 : -1;
        if (more < 0 || first < 0x20) fail(more < 0 ? "no UTF-8" : "a control character in a string");
        unsigned code = more ? first & (0x3F >> more) : first;
        for (int i = 1; i <= more; ++i) {
            auto next = at_ + i < text_.size() ? static_cast<unsigned char>(text_[at_ + i]) : 0U;
            if (next >> 6 != 2) fail("no UTF-8");
            code = code << 6 | (next & 0x3F);
        }
        if ((more == 2 && code < 0x800) || (more == 3 && (code < 0x10000 || code > 0x10FFFF)) || (code >> 11 == 27)) fail("no UTF-8");
        out.append(text_, at_, more + 1);
        at_ += more + 1;
    }

    std::string string() {
        std::string out;
        need('"');
        while (true) {
            if (at_ >= text_.size()) fail("a string without end");
            if (peek() == '"') return ++at_, out;
            if (peek() != '\\') {
                letter(out);
                continue;
            }
            ++at_;
            char c = peek();
            ++at_;
            const std::string from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
            if (auto i = from.find(c); i != std::string::npos && c) {
                out += to[i];
            } else if (c == 'u') {
                unsigned code = hex();
                if (code >> 10 == 0x36 && take("\\u")) {
                    unsigned low = hex();
                    if (low >> 10 != 0x37) fail("half of a pair");
                    code = 0x10000 + ((code & 0x3FF) << 10 | (low & 0x3FF));
                } else if (code >> 11 == 27) {
                    fail("half of a pair");
                }
                put(out, code);
            } else {
                fail("a wrong escape");
            }
        }
    }
};

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (std::size_t at = 0; at < text.size(); ++at) {
        auto c = static_cast<unsigned char>(text[at]);
        char shown[16];
        if (c == '"' || c == '\\') {
            out += '\\';
            out += static_cast<char>(c);
        } else if (c == '\n') {
            out += "\\n";
        } else if (c == '\r') {
            out += "\\r";
        } else if (c == '\t') {
            out += "\\t";
        } else if (c >= 0x20 && c < 0x7F) {
            out += static_cast<char>(c);
        } else if (c < 0x80) {
            std::snprintf(shown, sizeof shown, "\\u%04x", c);
            out += shown;
        } else {
            int more = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : 1;
            unsigned code = c & (0x3F >> more);
            for (int i = 0; i < more; ++i) code = code << 6 | (static_cast<unsigned char>(text[++at]) & 0x3F);
            if (code >= 0x10000) {
                code -= 0x10000;
                std::snprintf(shown, sizeof shown, "\\u%04x\\u%04x", 0xD800 | code >> 10, 0xDC00 | (code & 0x3FF));
            } else {
                std::snprintf(shown, sizeof shown, "\\u%04x", code);
            }
            out += shown;
        }
    }
    return out + '"';
}

}  // namespace

const Json* Json::find(const std::string& key) const {
    for (const auto& [name, value] : members)
        if (name == key) return &value;
    return nullptr;
}

std::string Json::dump() const {
    Strings parts;
    switch (kind) {
        case null: return "null";
        case boolean: return truth ? "true" : "false";
        case integer: return text;
        case number: return repr(real) == "inf" ? "Infinity" : repr(real);
        case string: return quoted(text);
        case list:
            for (const auto& item : items) parts.push_back(item.dump());
            return "[" + join(parts) + "]";
        default:
            for (const auto& [key, value] : members) parts.push_back(quoted(key) + ": " + value.dump());
            return "{" + join(parts) + "}";
    }
}

Json parse_json(const std::string& text, const std::string& where) { return Parser(text, where).document(); }

}  // namespace tw
